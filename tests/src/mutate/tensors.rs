//! Damage to tensors, and to the types of inputs and outputs.

use super::{Mutator, SMALL};
use crate::random::Random;
use onnx_protobuf::{
    GraphProto, SparseTensorProto, StringStringEntryProto, TensorProto, TensorShapeProto, ValueInfoProto,
    tensor_proto::DataLocation,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};

impl Mutator {
    pub(super) fn any_tensor(&self, random: &mut Random) -> Option<TensorProto> {
        let graph = self.any_graph(random)?;
        random.pick(&graph.initializer).filter(|t| t.raw_data.len() < SMALL).cloned()
    }

    pub(super) fn mutate_initializers(&self, graph: &mut GraphProto, random: &mut Random) {
        let Some(at) = random.index(&graph.initializer) else { return };
        match random.below(8) {
            0 => _ = graph.initializer.remove(at),
            1 => {
                let mut copy = graph.initializer[at].clone();
                if random.one_in(2) {
                    copy.name.push_str("_copy");
                }
                graph.initializer.push(copy);
            }
            2 => {
                if let Some(other) = self.any_tensor(random) {
                    let name = graph.initializer[at].name.clone();
                    graph.initializer[at] = TensorProto { name, ..other };
                }
            }
            3 => {
                let values = graph.initializer.remove(at);
                let indices = TensorProto {
                    dims: vec![values.dims.iter().product::<i64>().clamp(0, 64)],
                    data_type: 7,
                    int64_data: (0..8).map(|_| random.odd_int()).collect(),
                    ..Default::default()
                };
                graph.sparse_initializer.push(SparseTensorProto {
                    dims: values.dims.iter().map(|_| random.odd_int()).collect(),
                    values: Some(values).into(),
                    indices: Some(indices).into(),
                    ..Default::default()
                });
            }
            _ => mutate_tensor(&mut graph.initializer[at], random),
        }
    }
}

pub(super) fn change_list<T: Clone>(list: &mut Vec<T>, random: &mut Random, odd: impl Fn(&mut Random) -> T) {
    match (random.below(6), random.index(list)) {
        (0, Some(at)) => _ = list.remove(at),
        (1, _) | (_, None) => {
            let value = odd(random);
            list.push(value);
        }
        (2, Some(at)) => {
            let value = list[at].clone();
            list.extend(std::iter::repeat_n(value, random.below(40)));
        }
        (_, Some(at)) => list[at] = odd(random),
    }
}

fn change_dims(dims: &mut Vec<i64>, random: &mut Random) {
    match random.below(4) {
        0 => {
            let at = random.below(dims.len() + 1);
            dims.insert(at, 1);
        }
        1 => {
            let n = dims.len();
            if n > 1 {
                let (a, b) = (random.below(n), random.below(n));
                dims.swap(a, b);
            }
        }
        _ => change_list(dims, random, Random::odd_int),
    }
}

fn odd_dtype(random: &mut Random) -> i32 {
    if random.one_in(8) { random.odd_int() as i32 } else { random.below(24) as i32 }
}

pub(super) fn mutate_tensor(t: &mut TensorProto, random: &mut Random) {
    match random.below(10) {
        0..=1 => change_dims(&mut t.dims, random),
        2 => t.data_type = odd_dtype(random),
        3 => {
            let length = random.below(t.raw_data.len() + 1);
            t.raw_data.truncate(length);
        }
        4 => t.raw_data.extend(std::iter::repeat_n(0x7f, 1 + random.below(16))),
        5 => change_list(&mut t.float_data, random, Random::odd_float),
        6 => change_list(&mut t.int64_data, random, Random::odd_int),
        7 => {
            let entry = |key: &str, value: String| StringStringEntryProto {
                key: key.into(),
                value,
                ..Default::default()
            };
            let location =
                *random.pick(&["weights.bin", "../weights.bin", "/etc/hostname", ""]).unwrap_or(&"");
            t.external_data = vec![entry("location", location.into())];
            for key in ["offset", "length"] {
                if random.one_in(2) {
                    t.external_data.push(entry(key, random.odd_int().to_string()));
                }
            }
            t.data_location = DataLocation::EXTERNAL.into();
            t.raw_data.clear();
        }
        _ => extreme_elements(t, random),
    }
}

/// Other values in the stored elements, of which a few are at the ends of their type.
pub(super) fn extreme_elements(t: &mut TensorProto, random: &mut Random) {
    let width = match t.data_type {
        1 | 6 | 12 => 4,
        7 | 11 | 13 => 8,
        4 | 5 | 10 | 16 => 2,
        _ => 1,
    };
    for _ in 0..1 + random.below(4) {
        let elements = t.raw_data.len() / width;
        if elements == 0 {
            change_list(&mut t.int32_data, random, |r| r.odd_int() as i32);
            return;
        }
        let at = random.below(elements) * width;
        let bytes = match t.data_type {
            1 => random.odd_float().to_le_bytes().to_vec(),
            11 => f64::from(random.odd_float()).to_le_bytes().to_vec(),
            _ => random.odd_int().to_le_bytes().to_vec(),
        };
        t.raw_data[at..at + width].copy_from_slice(&bytes[..width]);
    }
}

pub(super) fn mutate_infos(infos: &mut Vec<ValueInfoProto>, random: &mut Random) {
    let Some(at) = random.index(infos) else { return };
    match random.below(8) {
        0 => _ = infos.remove(at),
        1 => {
            let copy = infos[at].clone();
            infos.push(copy);
        }
        2 => infos[at].type_.clear(),
        3 => infos[at].name = random.pick(&["", "ghost", "x"]).map_or_else(String::new, |&s| s.into()),
        _ => {
            let Some(type_proto::Value::TensorType(ty)) =
                infos[at].type_.as_mut().and_then(|t| t.value.as_mut())
            else {
                return;
            };
            match random.below(4) {
                0 => ty.elem_type = odd_dtype(random),
                1 => ty.shape.clear(),
                _ => mutate_shape(ty.shape.mut_or_insert_default(), random),
            }
        }
    }
}

fn mutate_shape(shape: &mut TensorShapeProto, random: &mut Random) {
    let value = match random.below(4) {
        0 => Some(dimension::Value::DimParam("N".into())),
        1 => None,
        _ => Some(dimension::Value::DimValue(random.odd_int())),
    };
    let dim = Dimension { value, ..Default::default() };
    match (random.below(5), random.index(&shape.dim)) {
        (0, Some(at)) => _ = shape.dim.remove(at),
        (1, _) | (_, None) => shape.dim.push(dim),
        (_, Some(at)) => shape.dim[at] = dim,
    }
}
