//! The text form of graphs, `.qir`: prints and parses every graph.
//!
//! ```text
//! qir 1
//! graph "digits" stage int8
//!
//! %0 = input "image" : u8[1x1x28x28] {scale 0.0078 zero 128}
//! %1 = const "w" : s8[16x1x3x3] {scale 0.02 zero 0} = seed(7)      ; comments run to the end of the line
//! %2 = "conv" QConv(window:(kernel:[3,3],…),…)(%0, %1) : u8[1x16x26x26] {scale 0.05 zero 0} @int8-jit
//!
//! output "features" = %2
//! ```
//!
//! A name is a quoted string with Rust's escapes. Attributes are the op's struct in RON. The type behind an op may be
//! left out; where it stands, it must be what inference finds. `@` names a device. Line breaks mean no more than
//! blanks. Values are numbered as they are printed; a text may number them at will, but before they are used.
//!
//! Contents of a constant are one of
//!
//! | form | contents |
//! |---|---|
//! | `[1, 2.5, -inf, 0x7fc00000]` | its elements in row-major order; hexadecimal gives the bits of a float |
//! | `splat(0)` | one element for all |
//! | `seed(7)` | pseudo-random elements: [`seeded`] |
//! | `blob(3)` | a tensor that is kept elsewhere: see [`print_with_blobs`] and [`parse_with_blobs`] |

use crate::{
    DType, Device, Element, Error, Graph, Kind, NodeId, Op, QuantParams, Shape, Stage, Tensor, TensorType,
    ValueId,
    limits::MAX_GENERATED_BYTES,
    record::{Builder, Entry},
    tensor::with_element,
};
use ron::{Options, extensions::Extensions};
use std::{
    collections::BTreeMap,
    fmt::{self, Write},
    str::FromStr,
};

/// The version in the first line.
const VERSION: u64 = 1;
/// Constants of more elements are printed as blobs, unless they are splats.
const SHORT: usize = 16;

/// Prints a graph for people: large constants are `blob(i)` and stay out of sight.
pub fn print(graph: &Graph) -> String {
    print_with_blobs(graph).0
}

/// Prints a graph as [`print()`] does, and hands out the tensors behind `blob(0)`, `blob(1)`, …:
/// [`parse_with_blobs`] makes the same graph of both.
pub fn print_with_blobs(graph: &Graph) -> (String, Vec<Tensor>) {
    let mut blobs = vec![];
    let text = print_constants(graph, &mut |tensor, text| {
        if tensor.shape().elements() <= SHORT || is_splat(tensor) {
            return contents(tensor, text);
        }
        write!(text, "blob({})", blobs.len())?;
        blobs.push(tensor.clone());
        Ok(())
    });
    (text, blobs)
}

/// Prints a graph with the elements of all its constants: [`parse`] makes the same graph of it.
pub fn print_inline(graph: &Graph) -> String {
    print_constants(graph, &mut |tensor, text| contents(tensor, text))
}

fn print_constants(graph: &Graph, constant: &mut dyn FnMut(&Tensor, &mut String) -> fmt::Result) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_graph(graph, constant, &mut text);
    text
}

fn write_graph(
    graph: &Graph,
    constant: &mut dyn FnMut(&Tensor, &mut String) -> fmt::Result,
    text: &mut String,
) -> fmt::Result {
    writeln!(text, "qir {VERSION}")?;
    writeln!(text, "graph {:?} stage {}\n", graph.name, graph.stage)?;
    let order = graph.order();
    let number: BTreeMap<NodeId, usize> = order.iter().copied().zip(0..).collect();
    let value = |v: ValueId| match v.port {
        0 => format!("%{}", number[&v.node]),
        port => format!("%{}.{port}", number[&v.node]),
    };
    for &id in &order {
        let node = graph.node(id);
        write!(text, "%{} = ", number[&id])?;
        let ty = node.outputs().iter().map(TensorType::to_string).collect::<Vec<_>>().join(", ");
        match node.kind() {
            Kind::Input => write!(text, "input {:?} : {ty}", node.name)?,
            Kind::Constant(tensor) => {
                write!(text, "const {:?} : {ty} = ", node.name)?;
                constant(tensor, text)?;
            }
            Kind::Op(op) => {
                let operands: Vec<String> = graph.operands(id).into_iter().map(value).collect();
                let attributes = notation().to_string(op).map_err(|_| fmt::Error)?;
                write!(text, "{:?} {attributes}({}) : {ty}", node.name, operands.join(", "))?;
            }
        }
        match node.device {
            Some(device) => writeln!(text, " @{device}")?,
            None => writeln!(text)?,
        }
    }
    if !graph.outputs().is_empty() {
        writeln!(text)?;
    }
    for output in graph.outputs() {
        writeln!(text, "output {:?} = {}", output.name, value(output.value))?;
    }
    Ok(())
}

/// RON in which an op is written `Conv(groups:1,…)` and not `Conv((groups:1,…))`.
fn notation() -> Options {
    Options::default().with_default_extension(Extensions::UNWRAP_VARIANT_NEWTYPES)
}

fn is_splat(tensor: &Tensor) -> bool {
    let mut elements = tensor.bytes().chunks(tensor.dtype().size());
    match elements.next() {
        Some(first) => tensor.shape().elements() > 1 && elements.all(|e| e == first),
        None => false,
    }
}

/// `splat(x)` or the list of all elements.
fn contents(tensor: &Tensor, text: &mut String) -> fmt::Result {
    let (open, close, count) =
        if is_splat(tensor) { ("splat(", ")", 1) } else { ("[", "]", tensor.shape().elements()) };
    text.push_str(open);
    with_element!(tensor.dtype(), T => {
        for (i, x) in tensor.as_slice::<T>().unwrap_or_default().iter().take(count).enumerate() {
            text.push_str(if i > 0 { ", " } else { "" });
            x.write(text)?;
        }
    });
    text.push_str(close);
    Ok(())
}

/// How an element is written and read.
trait Literal: Element {
    fn write(self, text: &mut String) -> fmt::Result;
    fn read(word: &str) -> Option<Self>;
    /// Element of a pseudo-random tensor of `dtype` from 64 random bits.
    fn random(bits: u64, dtype: DType) -> Self;
}

macro_rules! integer_literals {
    ($($t:ty),*) => {$(
        impl Literal for $t {
            fn write(self, text: &mut String) -> fmt::Result {
                write!(text, "{self}")
            }
            fn read(word: &str) -> Option<Self> {
                <$t>::from_str(word).ok()
            }
            fn random(bits: u64, dtype: DType) -> Self {
                let (lo, hi) = random_range(dtype);
                // The top 32 bits as a fraction of the range.
                let offset = ((bits >> 32) * (hi - lo + 1) as u64) >> 32;
                (lo + offset as i64) as $t
            }
        }
    )*};
}

integer_literals!(i8, u8, i16, u16, i32, u32, i64, u64);

fn random_range(dtype: DType) -> (i64, i64) {
    match dtype {
        DType::S8 => (-127, 127),
        DType::U8 => (0, 255),
        DType::S4 => (-7, 7),
        DType::U4 | DType::F4E2M1 => (0, 15),
        DType::S2 => (-2, 1),
        DType::U2 => (0, 3),
        // Codes, none of them NaN.
        small if small.is_small_float() => (0, 0x77),
        DType::Bool => (0, 1),
        DType::U16 | DType::U32 | DType::U64 => (0, 1000),
        _ => (-1000, 1000),
    }
}

/// Irwin–Hall: the sum of four 16-bit numbers, centred and scaled to variance 1, in f32.
fn roughly_normal(bits: u64) -> f32 {
    let sum: i32 = (0..4).map(|i| i32::from((bits >> (16 * i)) as u16)).sum();
    (sum - 2 * 65535) as f32 * (1.732_050_8 / 65536.0)
}

macro_rules! float_literals {
    ($($t:ty, $bits:ty, $display:expr, $parse:expr, $from:expr);* $(;)?) => {$(
        impl Literal for $t {
            fn write(self, text: &mut String) -> fmt::Result {
                match self.is_nan() {
                    true => write!(text, "{:#x}", self.to_bits()),
                    false => write!(text, "{}", $display(self)),
                }
            }
            fn read(word: &str) -> Option<Self> {
                match word.strip_prefix("0x") {
                    Some(bits) => <$bits>::from_str_radix(bits, 16).ok().map(<$t>::from_bits),
                    None => word.parse().ok().map($parse),
                }
            }
            fn random(bits: u64, _dtype: DType) -> Self {
                $from(roughly_normal(bits))
            }
        }
    )*};
}

float_literals! {
    f32, u32, f32::from, |x: f32| x, f32::from;
    f64, u64, f64::from, |x: f64| x, f64::from;
    half::f16, u16, half::f16::to_f32, half::f16::from_f32, half::f16::from_f32;
    half::bf16, u16, half::bf16::to_f32, half::bf16::from_f32, half::bf16::from_f32;
}

/// A tensor of pseudo-random elements: what `seed(n)` stands for. The same everywhere and for ever.
///
/// Element i takes the i-th output r of SplitMix64 started at `seed`. Integers are lo + ⌊(hi − lo + 1)·⌊r/2^32⌋/2^32⌋
/// with −127..=127 for s8, 0..=255 for u8, −7..=7 and 0..=15 for s4 and u4, 0..=1 for bool, −1000..=1000 for other signed and
/// 0..=1000 for other unsigned types. Floats are roughly normal: the sum of the four 16-bit parts of r, less its mean
/// and times √3/65536, in f32.
pub fn seeded(dtype: DType, shape: &Shape, seed: u64) -> Tensor {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    with_element!(dtype, T => filled(dtype, shape, |_| <T as Literal>::random(next(), dtype)))
}

fn filled<T: Element>(dtype: DType, shape: &Shape, element: impl FnMut(usize) -> T) -> Tensor {
    let elements = (0..shape.elements()).map(element).collect();
    // As many elements as the shape has, of the type that holds dtype.
    Tensor::from_vec_as::<T>(dtype, shape.clone(), elements)
        .unwrap_or_else(|_| Tensor::zeros(dtype, shape.clone()))
}

/// A text that is not a graph.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("line {line}, column {column}: {reason}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong, or what was expected and what stands there.
    pub reason: String,
}

/// Parses a graph whose constants are all in the text.
pub fn parse(text: &str) -> Result<Graph, ParseError> {
    parse_with_blobs(text, &[])
}

/// Parses a graph; `blobs` are the tensors behind `blob(0)`, `blob(1)`, …
pub fn parse_with_blobs(text: &str, blobs: &[Tensor]) -> Result<Graph, ParseError> {
    let parser = Parser { text, at: 0, blobs, generated: 0 };
    parser.graph().map_err(|Mistake { at, reason }| {
        let before = text.get(..at).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        ParseError {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            reason,
        }
    })
}

/// What is wrong at byte `at`.
struct Mistake {
    at: usize,
    reason: String,
}

struct Parser<'a> {
    text: &'a str,
    /// Byte offset of what is read next.
    at: usize,
    blobs: &'a [Tensor],
    /// Bytes of constants made up so far.
    generated: usize,
}

impl<'a> Parser<'a> {
    fn graph(mut self) -> Result<Graph, Mistake> {
        self.keyword("qir")?;
        let at = self.next();
        if self.integer::<u64>("the version")? != VERSION {
            return Err(Mistake { at, reason: format!("only version {VERSION} is known") });
        }
        self.keyword("graph")?;
        let name = self.string()?;
        self.keyword("stage")?;
        let at = self.next();
        let stage = self.word();
        let stage =
            Stage::from_name(stage).ok_or_else(|| self.mistake(at, format!("unknown stage `{stage}`")))?;
        let mut builder = Builder::new(name, stage);
        loop {
            if self.eat("%") {
                self.node(&mut builder)?;
            } else if self.next() == self.text.len() {
                return Ok(builder.graph);
            } else {
                self.keyword("output")?;
                let name = self.string()?;
                self.expect("=")?;
                let value = self.value(&builder)?;
                builder.graph.output(name, value);
            }
        }
    }

    /// A node, from behind its `%`.
    fn node(&mut self, builder: &mut Builder<u64>) -> Result<(), Mistake> {
        let start = self.at;
        let number = self.integer("the number of a value")?;
        if builder.contains(number) {
            return Err(self.mistake(start, format!("%{number} is defined already")));
        }
        self.expect("=")?;
        let at = self.next();
        if self.text[at..].starts_with('"') {
            let name = self.string()?;
            let at = self.next();
            let op = self.op()?;
            let operands = self.operands(builder)?;
            let stated = if self.eat(":") { Some((self.next(), self.types()?)) } else { None };
            let device = self.device()?;
            let id = builder
                .add(number, &name, device, Entry::Op(op, operands))
                .map_err(|e| self.refusal(at, e))?;
            let inferred = builder.graph.node(id).outputs();
            return match stated {
                Some((at, types)) if types != inferred => {
                    Err(self.mistake(at, format!("the type of {name:?} is {inferred:?}, not {types:?}")))
                }
                _ => Ok(()),
            };
        }
        let kind = self.word();
        if !matches!(kind, "input" | "const") {
            return Err(self.unexpected(at, "`input`, `const` or the quoted name of an op"));
        }
        let name = self.string()?;
        self.expect(":")?;
        let ty = self.ty()?;
        let entry = if kind == "input" {
            Entry::Input(ty)
        } else {
            self.expect("=")?;
            Entry::Constant(self.contents(&ty)?, ty.quant)
        };
        let device = self.device()?;
        builder.add(number, &name, device, entry).map(|_| ()).map_err(|e| self.refusal(at, e))
    }

    /// Mnemonic and attributes: RON up to the parenthesis that closes the first one.
    fn op(&mut self) -> Result<Op, Mistake> {
        let start = self.next();
        let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
        for (i, &b) in self.text.as_bytes()[start..].iter().enumerate() {
            match b {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                _ if quoted => {}
                b'(' | b'[' | b'{' => depth += 1,
                b')' | b']' | b'}' => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        self.at = start + i + 1;
                        let source = &self.text[start..self.at];
                        return notation().from_str(source).map_err(|e| {
                            let line = source.split_inclusive('\n').take(e.span.start.line - 1);
                            let before: usize = line.map(str::len).sum();
                            let at = start + before + e.span.start.col.saturating_sub(1);
                            self.mistake(at.min(self.at), format!("attributes: {}", e.code))
                        });
                    }
                }
                b'\n' if depth == 0 => break,
                _ => {}
            }
        }
        Err(self.unexpected(start, "an op such as `Reshape(shape:[2,3])`"))
    }

    fn operands(&mut self, builder: &Builder<u64>) -> Result<Vec<ValueId>, Mistake> {
        self.expect("(")?;
        let mut operands = vec![];
        while !self.eat(")") {
            if !operands.is_empty() {
                self.expect(",")?;
            }
            operands.push(self.value(builder)?);
        }
        Ok(operands)
    }

    fn value(&mut self, builder: &Builder<u64>) -> Result<ValueId, Mistake> {
        let at = self.next();
        self.expect("%")?;
        let number = self.integer("the number of a value")?;
        let port = if self.eat(".") { self.integer("the number of an output")? } else { 0 };
        builder
            .value(number, port)
            .ok_or_else(|| self.mistake(at, format!("%{number}.{port} is not a value defined above")))
    }

    fn types(&mut self) -> Result<Vec<TensorType>, Mistake> {
        let mut types = vec![self.ty()?];
        while self.eat(",") {
            types.push(self.ty()?);
        }
        Ok(types)
    }

    fn ty(&mut self) -> Result<TensorType, Mistake> {
        let at = self.next();
        let name = self.word();
        let Some(dtype) = DType::from_name(name) else {
            return Err(self.unexpected(at, "an element type such as `f32`"));
        };
        self.expect("[")?;
        let mut dims: Vec<usize> = vec![];
        while !self.eat("]") {
            if !dims.is_empty() {
                self.expect("x")?;
            }
            dims.push(self.integer("a dimension")?);
        }
        let shape = Shape::new(dims).map_err(|e| self.mistake(at, e.to_string()))?;
        let ty = match self.eat("{") {
            true => {
                let quant = self.grid(at)?;
                TensorType::quantized(dtype, shape, quant)
            }
            false => Ok(TensorType::new(dtype, shape)),
        };
        ty.and_then(|ty| ty.check_size().map(|()| ty)).map_err(|e| self.mistake(at, e.to_string()))
    }

    /// A grid, from behind its `{`.
    fn grid(&mut self, at: usize) -> Result<QuantParams, Mistake> {
        let grid = if self.eat("axis") {
            let axis = self.integer("an axis")?;
            self.keyword("scales")?;
            let scales = self.list(|p| p.float("a scale"))?;
            self.keyword("zeros")?;
            QuantParams::per_axis(axis, scales, self.list(|p| p.integer("a zero point"))?)
        } else {
            self.keyword("scale")?;
            let scale = self.float("a scale")?;
            self.keyword("zero")?;
            QuantParams::per_tensor(scale, self.integer("a zero point")?)
        };
        self.expect("}")?;
        grid.map_err(|e| self.mistake(at, e.to_string()))
    }

    fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Result<T, Mistake>) -> Result<Vec<T>, Mistake> {
        self.expect("[")?;
        let mut items = vec![];
        while !self.eat("]") {
            if !items.is_empty() {
                self.expect(",")?;
            }
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn contents(&mut self, ty: &TensorType) -> Result<Tensor, Mistake> {
        let at = self.next();
        if self.text[at..].starts_with('[') {
            return with_element!(ty.dtype, T => {
                let elements = self.list(|p| p.element::<T>(ty.dtype))?;
                Tensor::from_vec_as::<T>(ty.dtype, ty.shape.clone(), elements)
            })
            .map_err(|e| self.mistake(at, e.to_string()));
        }
        let form = self.word();
        let open = self.expect("(");
        let tensor = match form {
            "splat" => {
                open?;
                self.generate(at, ty)?;
                with_element!(ty.dtype, T => {
                    let element = self.element::<T>(ty.dtype)?;
                    filled(ty.dtype, &ty.shape, |_| element)
                })
            }
            "seed" => {
                open?;
                self.generate(at, ty)?;
                seeded(ty.dtype, &ty.shape, self.integer("a seed")?)
            }
            "blob" => {
                open?;
                let i: usize = self.integer("the index of a blob")?;
                let tensor = self.blobs.get(i).cloned().ok_or_else(|| {
                    let reason = format!(
                        "blob({i}) is not in the text and only {} blobs came with it",
                        self.blobs.len()
                    );
                    self.mistake(at, reason)
                })?;
                if tensor.ty() != TensorType::new(ty.dtype, ty.shape.clone()) {
                    return Err(self.mistake(at, format!("blob({i}) is {}, not {ty}", tensor.ty())));
                }
                tensor
            }
            _ => return Err(self.unexpected(at, "a list of elements, `splat(x)`, `seed(n)` or `blob(i)`")),
        };
        self.expect(")")?;
        Ok(tensor)
    }

    fn element<T: Literal>(&mut self, dtype: DType) -> Result<T, Mistake> {
        let at = self.next();
        let word = self.word();
        T::read(word).ok_or_else(|| self.unexpected(at, &format!("an element of {dtype}")))
    }

    /// Accounts for a constant of which the text holds no elements.
    fn generate(&mut self, at: usize, ty: &TensorType) -> Result<(), Mistake> {
        self.generated = self.generated.saturating_add(ty.bytes());
        if self.generated > MAX_GENERATED_BYTES {
            let reason = format!("splats and seeds add up to more than {MAX_GENERATED_BYTES} bytes");
            return Err(self.mistake(at, reason));
        }
        Ok(())
    }

    fn device(&mut self) -> Result<Option<Device>, Mistake> {
        if !self.eat("@") {
            return Ok(None);
        }
        let at = self.next();
        let name = self.word();
        match Device::from_name(name) {
            Some(device) => Ok(Some(device)),
            None => Err(self.mistake(at, format!("unknown device `{name}`"))),
        }
    }

    // ---- words

    /// Skips blanks and comments; the offset of what follows.
    fn next(&mut self) -> usize {
        loop {
            let rest = &self.text[self.at..];
            let blank = rest.len() - rest.trim_start().len();
            self.at += blank;
            if !self.text[self.at..].starts_with(';') {
                return self.at;
            }
            self.at += self.text[self.at..].find('\n').unwrap_or(self.text.len() - self.at);
        }
    }

    fn eat(&mut self, token: &str) -> bool {
        let at = self.next();
        let found = self.text[at..].starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn expect(&mut self, token: &str) -> Result<(), Mistake> {
        let at = self.next();
        if self.eat(token) { Ok(()) } else { Err(self.unexpected(at, &format!("`{token}`"))) }
    }

    fn keyword(&mut self, keyword: &str) -> Result<(), Mistake> {
        let at = self.next();
        if self.word() == keyword { Ok(()) } else { Err(self.unexpected(at, &format!("`{keyword}`"))) }
    }

    /// Letters, digits and what stands in numbers; empty where something else stands.
    fn word(&mut self) -> &'a str {
        let at = self.next();
        let rest = &self.text[at..];
        let in_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '+' | '.');
        let word = &rest[..rest.find(|c| !in_word(c)).unwrap_or(rest.len())];
        self.at += word.len();
        word
    }

    /// An integer, which ends before the `x` of a shape and the `.` of an output.
    fn integer<T: FromStr>(&mut self, what: &str) -> Result<T, Mistake> {
        let at = self.next();
        let rest = &self.text[at..];
        let sign = usize::from(rest.starts_with('-'));
        let digits = rest[sign..].find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len() - sign);
        self.at += sign + digits;
        rest[..sign + digits].parse().map_err(|_| self.unexpected(at, what))
    }

    fn float(&mut self, what: &str) -> Result<f32, Mistake> {
        let at = self.next();
        self.word().parse().map_err(|_| self.unexpected(at, what))
    }

    fn string(&mut self) -> Result<String, Mistake> {
        let start = self.next();
        self.expect("\"")?;
        let mut name = String::new();
        let mut chars = self.text[self.at..].char_indices();
        while let Some((i, c)) = chars.next() {
            match c {
                '"' => {
                    self.at += i + 1;
                    return Ok(name);
                }
                '\\' => {
                    let at = self.at + i;
                    match unescape(&mut chars.by_ref().map(|(_, c)| c)) {
                        Some(c) => name.push(c),
                        None => return Err(self.mistake(at, "an escape that Rust does not know")),
                    }
                }
                '\n' => break,
                c => name.push(c),
            }
        }
        Err(self.mistake(start, "a string that is not closed on its line"))
    }

    fn mistake(&self, at: usize, reason: impl Into<String>) -> Mistake {
        Mistake { at, reason: reason.into() }
    }

    fn refusal(&self, at: usize, e: Error) -> Mistake {
        self.mistake(at, e.to_string())
    }

    fn unexpected(&self, at: usize, expected: &str) -> Mistake {
        let found: String = self.text[at..].chars().take_while(|c| *c != '\n').take(20).collect();
        let found = if found.is_empty() { "the end".into() } else { format!("`{found}`") };
        self.mistake(at, format!("expected {expected}, found {found}"))
    }
}

/// The character that an escape stands for, from behind its backslash.
fn unescape(chars: &mut impl Iterator<Item = char>) -> Option<char> {
    Some(match chars.next()? {
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        '0' => '\0',
        c @ ('\\' | '"' | '\'') => c,
        'u' => {
            chars.next().filter(|&c| c == '{')?;
            let digits: String = chars.take_while(|&c| c != '}').take(7).collect();
            if digits.len() > 6 {
                return None;
            }
            char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?
        }
        _ => return None,
    })
}
