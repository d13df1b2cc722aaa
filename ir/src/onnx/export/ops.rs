//! What each op of the IR is in ONNX.

use super::{Exporter, proto::*};
use crate::{
    DType, NodeId, Op, OpError, QuantParams, Shape, Tensor, TensorType, ValueId,
    numerics::{PowerRounding, quantize, small_float_code},
    onnx::tensor::dtype_code,
    ops::{
        ArgExtreme, BinaryKind, Clamp, Conv, Coordinates, Cumulate, CumulateKind, FakeQuant, GridSample,
        Interpolation, Layout, MatMul, Nearest, Normalize, Pad, PadMode, Pool, PoolKind, Reduce, ReduceKind,
        Resample, RoiAlign, SampleMode, SamplePadding, Slice, SliceSpec, TopK, UnaryKind, Update, Window,
    },
};
use half::{bf16, f16};
use onnx_protobuf::AttributeProto;

type Result<T, E = OpError> = std::result::Result<T, E>;

/// An op on its way into the file.
struct Writer<'e, 'g> {
    exporter: &'e mut Exporter<'g>,
    name: String,
    operands: Vec<ValueId>,
    id: NodeId,
}

/// Writes the ONNX nodes of IR node `id`; answers the name of the last one's result.
pub(super) fn write(exporter: &mut Exporter<'_>, id: NodeId, op: &Op) -> Result<String> {
    let name = exporter.graph.node(id).name.clone();
    let operands = exporter.graph.operands(id);
    let mut w = Writer { exporter, name, operands, id };
    match op {
        Op::Conv(op) => w.conv(op),
        Op::MatMul(op) => w.matmul(op),
        Op::Determinant(_) => Ok(w.plain("Det", vec![])),
        Op::BatchNorm(op) => w.on_axis_1(op.axis, |w, x| {
            let mut inputs = vec![x];
            inputs.extend((1..5).map(|slot| w.operand(slot)));
            Ok(w.op("BatchNormalization", inputs, vec![float("epsilon", op.epsilon)]))
        }),
        Op::Lrn(op) => w.channels_first(op.layout, |w, x| {
            let attributes = vec![
                int("size", op.size as i64),
                float("alpha", op.alpha),
                float("beta", op.beta),
                float("bias", op.bias),
            ];
            Ok(w.op("LRN", vec![x], attributes))
        }),
        Op::Normalize(op) => w.normalize(op),
        Op::Softmax(op) => {
            Ok(w.plain(if op.log { "LogSoftmax" } else { "Softmax" }, vec![int("axis", op.axis as i64)]))
        }
        Op::Pool(op) => w.pool(op),
        Op::Unary(op) => w.unary(op.kind),
        Op::Binary(op) => Ok(w.binary(op.kind)),
        Op::Where(_) => Ok(w.plain("Where", vec![])),
        Op::CastSmall(op) if op.to == DType::F8E8M0 => {
            Err(OpError::unsupported("has no form before opset 24"))
        }
        Op::CastSmall(op) => {
            let attributes = vec![int("to", dtype_code(op.to).into()), int("saturate", op.saturate.into())];
            Ok(w.plain("Cast", attributes))
        }
        Op::BitCast(_) => Err(OpError::unsupported("has no form before opset 26")),
        Op::Cast(op) => Ok(w.plain("Cast", vec![int("to", dtype_code(op.to).into())])),
        Op::Reduce(op) => w.reduce(op),
        Op::ArgExtreme(op) => Ok(w.arg_extreme(op)),
        Op::TopK(op) => w.top_k(op),
        Op::Cumulate(op) => w.cumulate(op),
        Op::Resample(op) => w.resample(op),
        Op::Reshape(op) => w.reshape(&op.shape),
        Op::Transpose(op) => Ok(w.plain("Transpose", vec![ints("perm", op.perm.iter().copied())])),
        Op::Slice(op) => w.slice(op),
        Op::Concat(op) => Ok(w.plain("Concat", vec![int("axis", op.axis as i64)])),
        Op::Pad(op) => w.pad(op),
        Op::Expand(op) => {
            let x = w.operand(0);
            let shape = w.ints("shape", op.shape.iter().map(|&d| d as i64).collect())?;
            Ok(w.op("Expand", vec![x, shape], vec![]))
        }
        Op::Gather(op) => Ok(w.plain("Gather", vec![int("axis", op.axis as i64)])),
        Op::GatherElements(op) => Ok(w.plain("GatherElements", vec![int("axis", op.axis as i64)])),
        Op::GatherNd(op) => Ok(w.plain("GatherND", vec![int("batch_dims", op.batch_dims as i64)])),
        Op::ScatterElements(op) => {
            let attributes = vec![int("axis", op.axis as i64), string("reduction", reduction(op.update))];
            Ok(w.plain("ScatterElements", attributes))
        }
        Op::ScatterNd(op) => Ok(w.plain("ScatterND", vec![string("reduction", reduction(op.update))])),
        Op::Quantize(op) => {
            let x = w.operand(0);
            w.quantize(x, op.dtype, &op.params)
        }
        Op::Dequantize(_) => {
            let ty = w.ty(0).clone();
            let grid = ty.quant.ok_or_else(|| OpError::quant("the operand has no grid"))?;
            let x = w.operand(0);
            w.dequantize(x, ty.dtype, &grid)
        }
        Op::FakeQuant(op) => w.fake_quant(op),
        // What integers stand for is said by the ops that dequantize them; where they are, has no ONNX form.
        Op::AssumeGrid(_) | Op::Transfer(_) => Ok(w.operand(0)),
        Op::GridSample(op) => Ok(w.plain("GridSample", grid_sample_attributes(op))),
        Op::PlainMatMul(_) => Ok(w.plain("MatMul", vec![])),
        Op::Inverse(_) | Op::LinearAttention(_) | Op::TreeEnsemble(_) | Op::CoupleProbabilities(_) => {
            Err(OpError::unsupported("is an op that ONNX does not have, or not at this opset"))
        }
        Op::RoiAlign(op) => Ok(w.plain("RoiAlign", roi_align_attributes(op))),
        Op::MaxRoiPool(op) => {
            let bins = ints("pooled_shape", [op.height, op.width]);
            Ok(w.plain("MaxRoiPool", vec![bins, float("spatial_scale", op.scale)]))
        }
        Op::IntConv(_) => Err(OpError::unsupported("multiplies integers of 32 bits, which no ONNX op does")),
        Op::Recurrent(_) => {
            Err(OpError::unsupported("is the recurrence of a layer without the products of its input"))
        }
        Op::ArgMaxPool(_) => {
            Err(OpError::unsupported("gives the places of a pool without its values, which no ONNX op does"))
        }
        Op::DynamicQuantize(_) | Op::QMatMulToFloat(_) | Op::QConvToFloat(_) => Err(OpError::unsupported(
            "quantizes at run time or is a product of codes with float results, which no ONNX op is; export the graph as imported, or at the fake-quant stage",
        )),
        Op::QConv(_)
        | Op::QMatMul(_)
        | Op::QAveragePool(_)
        | Op::QResample(_)
        | Op::QUnary(_)
        | Op::QBinary(_) => {
            Err(OpError::unsupported("is an integer op; export the graph at the fake-quant stage"))
        }
    }
}

fn roi_align_attributes(op: &RoiAlign) -> Vec<AttributeProto> {
    let places = if op.half_pixel { "half_pixel" } else { "output_half_pixel" };
    vec![
        string("mode", if op.largest { "max" } else { "avg" }),
        string("coordinate_transformation_mode", places),
        int("output_height", op.height as i64),
        int("output_width", op.width as i64),
        int("sampling_ratio", op.samples as i64),
        float("spatial_scale", op.scale),
    ]
}

fn reduction(update: Update) -> &'static str {
    match update {
        Update::Replace => "none",
        Update::Add => "add",
        Update::Mul => "mul",
        Update::Max => "max",
        Update::Min => "min",
    }
}

/// In the spelling of opset 16, where samples have two dimensions; later ones say linear and cubic.
fn grid_sample_attributes(op: &GridSample) -> Vec<AttributeProto> {
    let mode = match op.mode {
        SampleMode::Nearest => "nearest",
        SampleMode::Linear => "bilinear",
        SampleMode::Cubic => "bicubic",
    };
    let padding = match op.padding {
        SamplePadding::Zeros => "zeros",
        SamplePadding::Border => "border",
        SamplePadding::Reflection => "reflection",
    };
    vec![string("mode", mode), string("padding_mode", padding), int("align_corners", op.align_corners.into())]
}

fn binary_name(kind: BinaryKind, dtype: DType) -> &'static str {
    let of_bits = dtype != DType::Bool;
    match kind {
        BinaryKind::And if of_bits => "BitwiseAnd",
        BinaryKind::Or if of_bits => "BitwiseOr",
        BinaryKind::Xor if of_bits => "BitwiseXor",
        BinaryKind::Modulo | BinaryKind::Remainder => "Mod",
        BinaryKind::PRelu => "PRelu",
        BinaryKind::ShiftLeft | BinaryKind::ShiftRight => "BitShift",
        BinaryKind::Add => "Add",
        BinaryKind::Sub => "Sub",
        BinaryKind::Mul => "Mul",
        BinaryKind::Div => "Div",
        BinaryKind::Max => "Max",
        BinaryKind::Min => "Min",
        BinaryKind::Pow => "Pow",
        BinaryKind::Equal => "Equal",
        BinaryKind::Less => "Less",
        BinaryKind::LessOrEqual => "LessOrEqual",
        BinaryKind::Greater => "Greater",
        BinaryKind::GreaterOrEqual => "GreaterOrEqual",
        BinaryKind::And => "And",
        BinaryKind::Or => "Or",
        BinaryKind::Xor => "Xor",
    }
}

fn reduce_name(kind: ReduceKind) -> &'static str {
    match kind {
        ReduceKind::Sum => "ReduceSum",
        ReduceKind::Mean => "ReduceMean",
        ReduceKind::Max => "ReduceMax",
        ReduceKind::Min => "ReduceMin",
        ReduceKind::Product => "ReduceProd",
        ReduceKind::SumSquare => "ReduceSumSquare",
        ReduceKind::L1 => "ReduceL1",
        ReduceKind::L2 => "ReduceL2",
        ReduceKind::LogSum => "ReduceLogSum",
        ReduceKind::LogSumExp => "ReduceLogSumExp",
    }
}

/// A number of type `dtype`, or a vector of them, from f64.
fn numbers(dtype: DType, shape: Shape, values: &[f64]) -> Result<Tensor> {
    macro_rules! of {
        ($convert:expr) => {
            Tensor::from_vec_as(dtype, shape, values.iter().map($convert).collect())
        };
    }
    Ok(match dtype {
        DType::F32 => of!(|&v| v as f32),
        DType::F64 => of!(|&v| v),
        DType::F16 => of!(|&v| f16::from_f64(v)),
        DType::BF16 => of!(|&v| bf16::from_f64(v)),
        DType::S8 | DType::S4 | DType::S2 => of!(|&v| v as i8),
        DType::U8 | DType::U4 | DType::U2 | DType::Bool => of!(|&v| v as u8),
        DType::F8E4M3Fn
        | DType::F8E4M3Fnuz
        | DType::F8E5M2
        | DType::F8E5M2Fnuz
        | DType::F8E8M0
        | DType::F4E2M1 => of!(|&v| small_float_code(dtype, v as f32, true, PowerRounding::Up)),
        DType::S16 => of!(|&v| v as i16),
        DType::U16 => of!(|&v| v as u16),
        DType::S32 => of!(|&v| v as i32),
        DType::U32 => of!(|&v| v as u32),
        DType::S64 => of!(|&v| v as i64),
        DType::Str => return Err(OpError::dtype("a number as a text")),
        DType::U64 => of!(|&v| v as u64),
    }?)
}

/// A value for each index of a grid's axis, or the one of the whole tensor as a scalar.
fn per_index(dtype: DType, grid: &QuantParams, values: &[f64]) -> Result<Tensor> {
    let shape = if grid.axis().is_some() { Shape::new([values.len()])? } else { Shape::scalar() };
    numbers(dtype, shape, values)
}

fn resample_attributes(op: &Resample) -> Vec<AttributeProto> {
    let (coordinates, outside) = match op.coordinates {
        Coordinates::HalfPixel => ("half_pixel", 0.0),
        Coordinates::HalfPixelSymmetric => ("half_pixel_symmetric", 0.0),
        Coordinates::PytorchHalfPixel => ("pytorch_half_pixel", 0.0),
        Coordinates::AlignCorners => ("align_corners", 0.0),
        Coordinates::Asymmetric => ("asymmetric", 0.0),
        Coordinates::TfHalfPixelForNn => ("tf_half_pixel_for_nn", 0.0),
        Coordinates::TfCropAndResize { outside, .. } => ("tf_crop_and_resize", outside),
    };
    let mut attributes = vec![
        string("coordinate_transformation_mode", coordinates),
        float("extrapolation_value", outside),
        int("exclude_outside", op.exclude_outside.into()),
    ];
    attributes.extend(match op.interpolation {
        Interpolation::Nearest(nearest) => {
            let rounding = match nearest {
                Nearest::PreferFloor => "round_prefer_floor",
                Nearest::PreferCeil => "round_prefer_ceil",
                Nearest::Floor => "floor",
                Nearest::Ceil => "ceil",
            };
            vec![string("mode", "nearest"), string("nearest_mode", rounding)]
        }
        Interpolation::Linear { antialias } => {
            vec![string("mode", "linear"), int("antialias", antialias.into())]
        }
        Interpolation::Cubic { a, antialias } => {
            vec![string("mode", "cubic"), float("cubic_coeff_a", a), int("antialias", antialias.into())]
        }
    });
    attributes
}

fn window_attributes(window: &Window) -> Vec<AttributeProto> {
    let pads = window.pads_begin.iter().chain(&window.pads_end).copied();
    vec![
        ints("kernel_shape", window.kernel.iter().copied()),
        ints("strides", window.strides.iter().copied()),
        ints("dilations", window.dilations.iter().copied()),
        ints("pads", pads),
    ]
}

impl Writer<'_, '_> {
    fn operand(&mut self, slot: usize) -> String {
        self.exporter.value(self.operands[slot])
    }

    fn ty(&self, slot: usize) -> &TensorType {
        self.exporter.graph.ty(self.operands[slot])
    }

    fn op(&mut self, op: &str, inputs: Vec<String>, attributes: Vec<AttributeProto>) -> String {
        self.exporter.op(&self.name, op, inputs, attributes)
    }

    /// An op whose operands are those of the IR's.
    fn plain(&mut self, op: &str, attributes: Vec<AttributeProto>) -> String {
        let inputs = (0..self.operands.len()).map(|slot| self.operand(slot)).collect();
        self.op(op, inputs, attributes)
    }

    fn constant(&mut self, role: &str, value: &Tensor) -> String {
        self.exporter.constant(&format!("{}_{role}", self.name), value)
    }

    fn ints(&mut self, role: &str, values: Vec<i64>) -> Result<String> {
        Ok(self.exporter.ints(&format!("{}_{role}", self.name), values)?)
    }

    /// Pixels as floats, less the means, by the deviations.
    fn normalize(&mut self, op: &Normalize) -> Result<String> {
        let mut dims = vec![1; self.ty(0).shape.rank() - op.axis];
        dims[0] = op.mean.len();
        let shape = Shape::new(dims)?;
        let mean = self.constant("mean", &Tensor::from_vec(shape.clone(), op.mean.clone())?);
        let std = self.constant("std", &Tensor::from_vec(shape, op.std.clone())?);
        let x = self.operand(0);
        let real = self.op("Cast", vec![x], vec![int("to", dtype_code(DType::F32).into())]);
        let centred = self.op("Sub", vec![real, mean], vec![]);
        Ok(self.op("Div", vec![centred, std], vec![]))
    }

    /// Writes an op that has its channels on axis 1, between transposes where the IR has them elsewhere.
    fn on_axis_1(
        &mut self,
        axis: usize,
        write: impl FnOnce(&mut Self, String) -> Result<String>,
    ) -> Result<String> {
        let rank = self.ty(0).shape.rank();
        let x = self.operand(0);
        if axis == 1 {
            return write(self, x);
        }
        let there: Vec<usize> = match axis {
            // A vector of channels: as a batch of one.
            0 if rank == 1 => return Err(OpError::unsupported("normalises a vector")),
            0 => [1, 0].into_iter().chain(2..rank).collect(),
            _ => [0, axis].into_iter().chain((1..rank).filter(|&d| d != axis)).collect(),
        };
        let mut back = vec![0; rank];
        for (i, &p) in there.iter().enumerate() {
            back[p] = i;
        }
        let x = self.op("Transpose", vec![x], vec![ints("perm", there)]);
        let y = write(self, x)?;
        Ok(self.op("Transpose", vec![y], vec![ints("perm", back)]))
    }

    fn channels_first(
        &mut self,
        layout: Layout,
        write: impl FnOnce(&mut Self, String) -> Result<String>,
    ) -> Result<String> {
        let axis = layout.channel_axis(self.ty(0).shape.rank());
        self.on_axis_1(axis, write)
    }

    fn conv(&mut self, op: &Conv) -> Result<String> {
        let y = self.channels_first(op.layout, |w, x| {
            let mut inputs = vec![x, w.operand(1)];
            if op.bias {
                inputs.push(w.operand(2));
            }
            let mut attributes = window_attributes(&op.window);
            attributes.push(int("group", op.groups as i64));
            Ok(w.op("Conv", inputs, attributes))
        })?;
        self.residual_and_clamp(y, op.residual_slot(), op.clamp)
    }

    fn matmul(&mut self, op: &MatMul) -> Result<String> {
        let are_matrices = self.ty(0).shape.rank() == 2 && self.ty(1).shape.rank() == 2;
        let mut inputs = vec![self.operand(0), self.operand(1)];
        if let Some(slot) = op.residual_slot().filter(|_| op.bias && self.sums_become_floats()) {
            // Other runtimes take a product for one of floats, grids or not, where a bias comes right behind it.
            let y = self.op("MatMul", inputs, vec![]);
            let (residual, bias) = (self.operand(slot), self.operand(2));
            let y = self.op("Add", vec![y, residual], vec![]);
            let y = self.op("Add", vec![y, bias], vec![]);
            return self.residual_and_clamp(y, None, op.clamp);
        }
        let y = match op.bias {
            true if are_matrices => {
                inputs.push(self.operand(2));
                self.op("Gemm", inputs, vec![])
            }
            true => {
                let y = self.op("MatMul", inputs, vec![]);
                let bias = self.operand(2);
                self.op("Add", vec![y, bias], vec![])
            }
            false => self.op("MatMul", inputs, vec![]),
        };
        self.residual_and_clamp(y, op.residual_slot(), op.clamp)
    }

    /// Whether weights are on a grid and what is added to sums of them is not.
    fn sums_become_floats(&self) -> bool {
        let is_rounded = |slot: usize| {
            let op = self.exporter.graph.op(self.operands[slot].node);
            matches!(op, Some(Op::FakeQuant(_) | Op::Dequantize(_)))
        };
        is_rounded(1) && !is_rounded(2)
    }

    fn residual_and_clamp(&mut self, y: String, residual: Option<usize>, clamp: Clamp) -> Result<String> {
        let y = match residual {
            Some(slot) => {
                let residual = self.operand(slot);
                self.op("Add", vec![y, residual], vec![])
            }
            None => y,
        };
        match clamp {
            Clamp::NONE => Ok(y),
            Clamp::RELU => Ok(self.op("Relu", vec![y], vec![])),
            clamp => self.clip(y, DType::F32, clamp),
        }
    }

    fn clip(&mut self, x: String, dtype: DType, clamp: Clamp) -> Result<String> {
        let mut bound = |role: &str, value: f32, none: f32| match value == none {
            true => Ok(String::new()),
            false => {
                let t = numbers(dtype, Shape::scalar(), &[value.into()])?;
                Ok::<_, OpError>(self.constant(role, &t))
            }
        };
        let min = bound("min", clamp.lo, f32::NEG_INFINITY)?;
        let max = bound("max", clamp.hi, f32::INFINITY)?;
        let mut inputs = vec![x, min, max];
        while inputs.last().is_some_and(String::is_empty) {
            inputs.pop();
        }
        Ok(self.op("Clip", inputs, vec![]))
    }

    fn pool(&mut self, op: &Pool) -> Result<String> {
        let (_, _, spatial) = op.layout.split(&self.ty(0).shape)?;
        let is_global = op.window.kernel == spatial && op.window.is_unpadded();
        let name = match op.kind {
            PoolKind::Max => "MaxPool",
            PoolKind::Average { .. } => "AveragePool",
        };
        self.channels_first(op.layout, |w, x| {
            if is_global {
                return Ok(w.op(&format!("Global{name}"), vec![x], vec![]));
            }
            let mut attributes = window_attributes(&op.window);
            attributes.push(int("ceil_mode", op.ceil_mode.into()));
            if let PoolKind::Average { count_include_pad } = op.kind {
                attributes.push(int("count_include_pad", count_include_pad.into()));
            }
            Ok(w.op(name, vec![x], attributes))
        })
    }

    fn binary(&mut self, kind: BinaryKind) -> String {
        let attributes = match kind {
            BinaryKind::Remainder => vec![int("fmod", 1)],
            BinaryKind::ShiftLeft => vec![string("direction", "LEFT")],
            BinaryKind::ShiftRight => vec![string("direction", "RIGHT")],
            _ => vec![],
        };
        self.plain(binary_name(kind, self.ty(0).dtype), attributes)
    }

    fn arg_extreme(&mut self, op: &ArgExtreme) -> String {
        let attributes = vec![
            int("axis", op.axis as i64),
            int("keepdims", op.keep_dims.into()),
            int("select_last_index", op.last.into()),
        ];
        self.plain(if op.largest { "ArgMax" } else { "ArgMin" }, attributes)
    }

    /// The second result of ONNX's op.
    fn top_k(&mut self, op: &TopK) -> Result<String> {
        let x = self.operand(0);
        let k = self.ints("k", vec![op.k as i64])?;
        let attributes = vec![int("axis", op.axis as i64), int("largest", op.largest.into())];
        Ok(self.exporter.op_of_two(&self.name, "TopK", vec![x, k], attributes))
    }

    fn cumulate(&mut self, op: &Cumulate) -> Result<String> {
        if op.kind == CumulateKind::Product {
            return Err(OpError::unsupported("has no form before opset 26"));
        }
        let x = self.operand(0);
        let axis = self.constant("axis", &Tensor::scalar(op.axis as i64));
        let attributes = vec![int("exclusive", op.exclusive.into()), int("reverse", op.reverse.into())];
        Ok(self.op("CumSum", vec![x, axis], attributes))
    }

    fn unary(&mut self, kind: UnaryKind) -> Result<String> {
        use UnaryKind::*;
        let (name, attributes) = match kind {
            Identity => ("Identity", vec![]),
            Relu => ("Relu", vec![]),
            LeakyRelu { alpha } => ("LeakyRelu", vec![float("alpha", alpha)]),
            Clip { lo, hi } => {
                let (x, dtype) = (self.operand(0), self.ty(0).dtype);
                return self.clip(x, dtype, Clamp { lo, hi });
            }
            Sigmoid => ("Sigmoid", vec![]),
            Tanh => ("Tanh", vec![]),
            HardSigmoid { alpha, beta } => ("HardSigmoid", vec![float("alpha", alpha), float("beta", beta)]),
            HardSwish => ("HardSwish", vec![]),
            Silu => {
                let x = self.operand(0);
                let gate = self.op("Sigmoid", vec![x.clone()], vec![]);
                return Ok(self.op("Mul", vec![x, gate], vec![]));
            }
            Gelu => ("Gelu", vec![]),
            GeluTanh => ("Gelu", vec![string("approximate", "tanh")]),
            Elu { alpha } => ("Elu", vec![float("alpha", alpha)]),
            Selu { alpha, gamma } => ("Selu", vec![float("alpha", alpha), float("gamma", gamma)]),
            Celu { alpha } => ("Celu", vec![float("alpha", alpha)]),
            Swish { alpha } => {
                let (x, dtype) = (self.operand(0), self.ty(0).dtype);
                let alpha = self.constant("alpha", &numbers(dtype, Shape::scalar(), &[alpha.into()])?);
                let scaled = self.op("Mul", vec![alpha, x.clone()], vec![]);
                let gate = self.op("Sigmoid", vec![scaled], vec![]);
                return Ok(self.op("Mul", vec![x, gate], vec![]));
            }
            ThresholdedRelu { alpha } => ("ThresholdedRelu", vec![float("alpha", alpha)]),
            Shrink { lambda, bias } => ("Shrink", vec![float("lambd", lambda), float("bias", bias)]),
            Mish => ("Mish", vec![]),
            Softplus => ("Softplus", vec![]),
            Softsign => ("Softsign", vec![]),
            Exp => ("Exp", vec![]),
            Log => ("Log", vec![]),
            Sqrt => ("Sqrt", vec![]),
            Reciprocal => ("Reciprocal", vec![]),
            Erf => ("Erf", vec![]),
            Neg => ("Neg", vec![]),
            Abs => ("Abs", vec![]),
            Sign => ("Sign", vec![]),
            Floor => ("Floor", vec![]),
            Ceil => ("Ceil", vec![]),
            Round => ("Round", vec![]),
            Sin => ("Sin", vec![]),
            Cos => ("Cos", vec![]),
            Tan => ("Tan", vec![]),
            Asin => ("Asin", vec![]),
            Acos => ("Acos", vec![]),
            Atan => ("Atan", vec![]),
            Sinh => ("Sinh", vec![]),
            Cosh => ("Cosh", vec![]),
            Asinh => ("Asinh", vec![]),
            Acosh => ("Acosh", vec![]),
            Atanh => ("Atanh", vec![]),
            Not => ("Not", vec![]),
        };
        Ok(self.plain(name, attributes))
    }

    fn reduce(&mut self, op: &Reduce) -> Result<String> {
        let x = self.operand(0);
        let axes = self.ints("axes", op.axes.iter().map(|&a| a as i64).collect())?;
        let attributes = vec![
            int("keepdims", op.keep_dims.into()),
            // No axes mean all of them otherwise.
            int("noop_with_empty_axes", op.axes.is_empty().into()),
        ];
        Ok(self.op(reduce_name(op.kind), vec![x, axes], attributes))
    }

    /// Leading dimensions that stay are copied, so that a model with another batch keeps working.
    /// A Resize that leaves the other axes as they are.
    fn resample(&mut self, op: &Resample) -> Result<String> {
        let shape = self.ty(0).shape.clone();
        let n = shape[op.axis];
        let rank = Shape::new([shape.rank()])?;
        let scale = op.scale as f32;
        let by_scale = f64::from(scale) == op.scale && (n as f64 * op.scale).floor() as usize == op.length;
        let crop = match op.coordinates {
            Coordinates::TfCropAndResize { start, end, .. } => Some((start, end)),
            _ => None,
        };
        let ignores_scale = crop.is_some() || op.coordinates == Coordinates::AlignCorners;
        let by_length = ignores_scale || (op.scale * n as f64 - op.length as f64).abs() < 1e-9;
        let mut inputs = vec![self.operand(0), String::new(), String::new()];
        if let Some((start, end)) = crop {
            let bound =
                |own: f32, other: f32| (0..shape.rank()).map(move |a| if a == op.axis { own } else { other });
            let roi: Vec<f32> = bound(start, 0.0).chain(bound(end, 1.0)).collect();
            inputs[1] = self.constant("roi", &Tensor::from_vec(Shape::new([roi.len()])?, roi)?);
        }
        if by_scale {
            let scales: Vec<f32> =
                (0..shape.rank()).map(|a| if a == op.axis { scale } else { 1.0 }).collect();
            inputs[2] = self.constant("scales", &Tensor::from_vec(rank, scales)?);
        } else if by_length {
            let mut sizes = shape.to_vec();
            sizes[op.axis] = op.length;
            inputs.push(self.ints("sizes", sizes.into_iter().map(|d| d as i64).collect())?);
        } else {
            let why = format!("resamples {n} to {} elements by scale {}", op.length, op.scale);
            return Err(OpError::unsupported(why));
        }
        Ok(self.op("Resize", inputs, resample_attributes(op)))
    }

    fn reshape(&mut self, shape: &Shape) -> Result<String> {
        let from = self.ty(0).shape.clone();
        let has_empty = shape.elements() == 0;
        let copied = from.iter().zip(shape.iter()).take_while(|(a, b)| a == b).count();
        let dims = shape.iter().enumerate();
        let target = dims.map(|(i, &d)| if i < copied && !has_empty { 0 } else { d as i64 }).collect();
        let x = self.operand(0);
        let target = self.ints("shape", target)?;
        let attributes = if has_empty { vec![int("allowzero", 1)] } else { vec![] };
        Ok(self.op("Reshape", vec![x, target], attributes))
    }

    fn slice(&mut self, op: &Slice) -> Result<String> {
        let shape = self.ty(0).shape.clone();
        let (mut starts, mut ends, mut axes, mut steps) = (vec![], vec![], vec![], vec![]);
        for (axis, part) in op.axes.iter().enumerate() {
            if *part == SliceSpec::all(shape[axis]) {
                continue;
            }
            let (start, len, step) = (part.start as i64, part.len as i64, part.step as i64);
            let step = if step == 0 { 1 } else { step };
            let end = start.saturating_add(len.saturating_mul(step));
            starts.push(start);
            // Before the first element there is no other number for the end: −1 is the last element.
            ends.push(if len > 0 && end < 0 { i64::MIN } else { end });
            axes.push(axis as i64);
            steps.push(step);
        }
        let mut inputs = vec![self.operand(0)];
        for (role, values) in [("starts", starts), ("ends", ends), ("axes", axes), ("steps", steps)] {
            inputs.push(self.ints(role, values)?);
        }
        Ok(self.op("Slice", inputs, vec![]))
    }

    fn pad(&mut self, op: &Pad) -> Result<String> {
        let ty = self.ty(0).clone();
        let x = self.operand(0);
        let pads = self.ints("pads", op.before.iter().chain(&op.after).map(|&p| p as i64).collect())?;
        let mut inputs = vec![x, pads];
        let mode = match op.mode {
            PadMode::Constant { value } => {
                let value = match ty.per_tensor() {
                    Some((scale, zero_point)) => (value / f64::from(scale)).round() + f64::from(zero_point),
                    None => value,
                };
                let value = numbers(ty.dtype, Shape::scalar(), &[value])?;
                inputs.push(self.constant("value", &value));
                "constant"
            }
            PadMode::Reflect => "reflect",
            PadMode::Edge => "edge",
            PadMode::Wrap => "wrap",
        };
        Ok(self.op("Pad", inputs, vec![string("mode", mode)]))
    }

    /// Scale and zero point as operands, and the axis.
    fn grid(&mut self, dtype: DType, grid: &QuantParams) -> Result<(Vec<String>, Vec<AttributeProto>)> {
        let scales: Vec<f64> = grid.scales().iter().map(|&s| s.into()).collect();
        let zeros: Vec<f64> = grid.zero_points().iter().map(|&z| z.into()).collect();
        let scale = per_index(DType::F32, grid, &scales)?;
        let mut operands = vec![self.constant("scale", &scale)];
        // ONNX has no zero points of 32-bit integers; they are 0.
        if dtype != DType::S32 {
            let zero_point = per_index(dtype, grid, &zeros)?;
            operands.push(self.constant("zero_point", &zero_point));
        } else if zeros.iter().any(|&z| z != 0.0) {
            return Err(OpError::quant("s32 with a zero point other than 0 has no ONNX form"));
        }
        Ok((operands, grid.axis().map(|a| int("axis", a as i64)).into_iter().collect()))
    }

    fn quantize(&mut self, x: String, dtype: DType, grid: &QuantParams) -> Result<String> {
        let (mut inputs, attributes) = self.grid(dtype, grid)?;
        inputs.insert(0, x);
        Ok(self.op("QuantizeLinear", inputs, attributes))
    }

    fn dequantize(&mut self, x: String, dtype: DType, grid: &QuantParams) -> Result<String> {
        let (mut inputs, attributes) = self.grid(dtype, grid)?;
        inputs.insert(0, x);
        Ok(self.op("DequantizeLinear", inputs, attributes))
    }

    fn fake_quant(&mut self, op: &FakeQuant) -> Result<String> {
        let grid = &op.params;
        let value = self.operands[0];
        if let Some(real) = self.exporter.graph.constant_value(value) {
            let codes = codes(real, op)?;
            let name = self.exporter.graph.node(value.node).name.clone();
            let codes = self.exporter.constant(&format!("{name}_quantized"), &codes);
            return self.dequantize(codes, op.dtype, grid);
        }
        let x = self.operand(0);
        if op.dtype.size() > 2 {
            return self.fake_quant_in_float(x, op);
        }
        let (lo, hi) = op.dtype.integer_range().unwrap_or((0, 0));
        let x = match (lo, hi) == (op.lo.into(), op.hi.into()) {
            true => x,
            false => self.bounded(x, op, true)?,
        };
        let codes = self.quantize(x, op.dtype, grid)?;
        // The scale and zero point of the first node serve the second as well.
        let last = self.exporter.proto.node.last();
        let mut inputs = last.map(|n| n.input.clone()).unwrap_or_default();
        let attributes = last.map(|n| n.attribute.clone()).unwrap_or_default();
        inputs[0] = codes;
        Ok(self.op("DequantizeLinear", inputs, attributes))
    }

    /// QuantizeLinear does not write 32-bit integers: clamp(round(x/s), lo − z, hi − z)·s.
    fn fake_quant_in_float(&mut self, x: String, op: &FakeQuant) -> Result<String> {
        let scales: Vec<f64> = op.params.scales().iter().map(|&s| s.into()).collect();
        let scale = self.along_axis(&op.params, &scales)?;
        let scale = self.constant("scale", &scale);
        let steps = self.op("Div", vec![x, scale.clone()], vec![]);
        let rounded = self.op("Round", vec![steps], vec![]);
        let codes = self.bounded(rounded, op, false)?;
        Ok(self.op("Mul", vec![codes, scale], vec![]))
    }

    /// x within the codes `lo` to `hi`, counted from the zero point: as real numbers or in steps.
    fn bounded(&mut self, mut x: String, op: &FakeQuant, real: bool) -> Result<String> {
        let grid = &op.params;
        for (name, bound) in [("Max", op.lo), ("Min", op.hi)] {
            let pairs = grid.scales().iter().zip(grid.zero_points());
            let values: Vec<f64> = pairs
                .map(|(&s, &z)| (f64::from(bound) - f64::from(z)) * if real { s.into() } else { 1.0 })
                .collect();
            let bound = self.along_axis(grid, &values)?;
            let bound = self.constant(if name == "Max" { "lo" } else { "hi" }, &bound);
            x = self.op(name, vec![x, bound], vec![]);
        }
        Ok(x)
    }

    /// One f32 for each index of the grid's axis, in a shape that broadcasts to the operand.
    fn along_axis(&self, grid: &QuantParams, values: &[f64]) -> Result<Tensor> {
        let dims = match grid.axis() {
            None => vec![],
            Some(axis) => {
                let rank = self.exporter.graph.node(self.id).outputs()[0].shape.rank();
                (0..rank).map(|d| if d == axis { values.len() } else { 1 }).collect()
            }
        };
        numbers(DType::F32, Shape::new(dims)?, values)
    }
}

/// The codes of a constant.
fn codes(real: &Tensor, op: &FakeQuant) -> Result<Tensor> {
    let shape = real.shape();
    let (stride, length) = match op.params.axis() {
        Some(axis) => (shape.strides()[axis], shape[axis]),
        None => (1, 1),
    };
    let code = |(i, &x): (usize, &f32)| {
        let (scale, zero_point) = op.params.at(i / stride % length);
        f64::from(quantize(x, scale, zero_point, op.lo, op.hi))
    };
    let codes: Vec<f64> = real.as_slice::<f32>()?.iter().enumerate().map(code).collect();
    numbers(op.dtype, shape.clone(), &codes)
}
