//! Kernels of 256 and 512 bits, assembled: Cranelift's vectors end at 128.
//!
//! Each is a function that walks one row and is called by a step that Cranelift compiles. They stand beside the general
//! kernels of the parent module for the shapes that real models are made of, and give the same bits; a shape or tier
//! that they do not take is left to those.

mod dynamic;
mod elementwise;
mod lookup;
mod planes;
mod pool;
mod program;
mod rows;
mod softmax;

pub(crate) use dynamic::quantize_rows;
pub(crate) use elementwise::elementwise;
pub(crate) use lookup::lookup;
pub(crate) use planes::{CodeGrid, Planes, interleave, quantize};
pub(crate) use pool::{CodeAverage, Kind as PoolKind, pool};
pub(crate) use softmax::softmax;

use crate::{dense::asm::vector::Width, lower::Lowering, tier::Isa};
use cranelift_module::FuncId;
use iced_x86::IcedError;

/// The vectors of a tier; `None` where Cranelift's are the widest.
fn width(isa: Isa) -> Option<Width> {
    match isa {
        Isa::AmxInt8 | Isa::Avx512Vnni => Some(Width::Zmm),
        Isa::AvxVnni | Isa::Avx2 => Some(Width::Ymm),
        Isa::XmmVnni | Isa::Xmm => None,
    }
}

/// Has a function of `parameters` pointers or integers assembled for the node being lowered.
fn define(
    cx: &mut Lowering,
    kernel: &str,
    parameters: usize,
    code: impl FnOnce() -> Result<Vec<u8>, IcedError> + Send + 'static,
) -> FuncId {
    let name = cx.step_name(kernel);
    cx.define_assembled(&name, parameters, code)
}
