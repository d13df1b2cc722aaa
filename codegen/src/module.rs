//! Machine code of one model: functions are compiled one by one into one mapping, which is sealed and later freed.
//!
//! The mapping is writable until [`CodeBuilder::finish`] and executable afterwards, never both.

use crate::{CodegenError, Tier};
use cranelift_codegen::{
    Context,
    control::ControlPlane,
    ir::{AbiParam, FuncRef, InstBuilder, MemFlagsData, Signature, UserFuncName, Value, types::I64},
    isa::{CallConv, OwnedTargetIsa},
    settings::{self, Configurable},
};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use cranelift_jit::{ArenaMemoryProvider, JITBuilder, JITModule};
use cranelift_module::{FuncId, Linkage, Module, ModuleReloc};
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write,
    sync::Mutex,
};

/// Flags of every access to model memory: it never traps, and it may be unaligned.
///
/// `MemFlagsData::trusted` would promise alignment, and a folded SSE operand of an unaligned address faults.
pub(crate) const MEM: MemFlagsData = MemFlagsData::new().with_notrap();

/// Address space that one model's code may take; only what is used becomes memory.
const CODE_SPACE: usize = 64 << 20;

/// How Cranelift compiles a function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FunctionKind {
    /// Optimised: loop nests and addressing.
    Driver,
    /// As written (`opt_level=none`): tiles that hold their accumulators in registers, which the optimiser would spill.
    Tile,
}

/// Code of one function before it is placed, kept for listings.
#[derive(Clone, Debug)]
pub(crate) struct FunctionText {
    pub(crate) name: String,
    /// CLIF; empty for functions that were assembled.
    pub(crate) clif: String,
    pub(crate) code: Vec<u8>,
}

/// Where an address points; resolved by [`Emitter::address`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Location {
    /// Byte offset in the arena. Values are 64-byte aligned and have `SLACK` readable bytes behind them.
    Arena(u64),
    /// Byte offset in the block of weights, which has `SLACK` readable bytes behind its end.
    Weights(u32),
    /// A graph input in the caller's memory: any alignment, no slack.
    Input(usize),
    /// A graph output in the caller's memory: any alignment, no slack.
    Output(usize),
}

/// What a running step is given; see [`model`](crate::model).
#[repr(C)]
pub(crate) struct Ctx {
    pub(crate) arena: *mut u8,
    pub(crate) weights: *const u8,
    /// Inputs, then outputs.
    pub(crate) external: *const *mut u8,
}

/// The code of a model under construction.
pub(crate) struct CodeBuilder {
    module: JITModule,
    tile_isa: OwnedTargetIsa,
    frontend: FunctionBuilderContext,
    context: Context,
    names: BTreeMap<String, FuncId>,
    /// Assembled functions by their code, which is the same wherever it lies: equal ones are stored once.
    assembled: HashMap<Vec<u8>, FuncId>,
    bytes: usize,
    texts: Option<Vec<FunctionText>>,
}

/// The executable code of a model; freed when dropped.
pub(crate) struct Code {
    module: Mutex<Option<JITModule>>,
    bytes: usize,
    texts: Vec<FunctionText>,
}

/// A function being emitted: a [`FunctionBuilder`] positioned in the entry block, and what it may refer to.
pub(crate) struct Emitter<'a> {
    pub(crate) b: FunctionBuilder<'a>,
    /// The parameters, in order.
    pub(crate) params: Vec<Value>,
    module: &'a mut JITModule,
    inputs: usize,
}

fn backend(function: &str, reason: impl std::fmt::Display) -> CodegenError {
    CodegenError::Backend { function: function.into(), reason: reason.to_string() }
}

fn isa(tier: &Tier, kind: FunctionKind) -> Result<OwnedTargetIsa, CodegenError> {
    let fail = |e: &dyn std::fmt::Display| backend("target", e);
    let mut flags = settings::builder();
    let opt_level = match kind {
        FunctionKind::Driver => "speed",
        FunctionKind::Tile => "none",
    };
    for (name, value) in [
        ("opt_level", opt_level),
        ("is_pic", "false"),
        ("use_colocated_libcalls", "false"),
        ("unwind_info", "false"),
        // Frames are a few hundred bytes; a probe would be a call out of the module.
        ("enable_probestack", "false"),
        ("enable_verifier", if cfg!(debug_assertions) { "true" } else { "false" }),
    ] {
        flags.set(name, value).map_err(|e| fail(&e))?;
    }
    let mut builder = cranelift_native::builder_with_options(false).map_err(|e| fail(&e))?;
    for flag in tier.cranelift_flags() {
        builder.enable(flag).map_err(|e| fail(&e))?;
    }
    builder.finish(settings::Flags::new(flags)).map_err(|e| fail(&e))
}

/// The convention of every function of qcc, on every OS: `count` pointers or 64-bit integers, no result.
pub(crate) fn signature(count: usize) -> Signature {
    let mut s = Signature::new(CallConv::SystemV);
    s.params.resize(count, AbiParam::new(I64));
    s
}

impl CodeBuilder {
    pub(crate) fn new(tier: &Tier, keep_texts: bool) -> Result<CodeBuilder, CodegenError> {
        let driver_isa = isa(tier, FunctionKind::Driver)?;
        let mut builder = JITBuilder::with_isa(driver_isa, cranelift_module::default_libcall_names());
        let memory = ArenaMemoryProvider::new_with_size(CODE_SPACE).map_err(|e| backend("memory", e))?;
        builder.memory_provider(Box::new(memory));
        Ok(CodeBuilder {
            module: JITModule::new(builder),
            tile_isa: isa(tier, FunctionKind::Tile)?,
            frontend: FunctionBuilderContext::new(),
            context: Context::new(),
            names: BTreeMap::new(),
            assembled: HashMap::new(),
            bytes: 0,
            texts: keep_texts.then(Vec::new),
        })
    }

    /// The function of this name, if it was defined already. Functions with one name must be one function.
    pub(crate) fn function(&self, name: &str) -> Option<FuncId> {
        self.names.get(name).copied()
    }

    fn declare(&mut self, name: &str, signature: &Signature) -> Result<FuncId, CodegenError> {
        let id =
            self.module.declare_function(name, Linkage::Local, signature).map_err(|e| backend(name, e))?;
        if self.names.insert(name.into(), id).is_some() {
            return Err(backend(name, "defined twice"));
        }
        Ok(id)
    }

    /// Compiles a function. `emit` starts in the entry block and must end every block, the last with a return.
    pub(crate) fn define_function(
        &mut self,
        name: &str,
        kind: FunctionKind,
        parameters: usize,
        inputs: usize,
        emit: impl FnOnce(&mut Emitter) -> Result<(), CodegenError>,
    ) -> Result<FuncId, CodegenError> {
        let signature = signature(parameters);
        let id = self.declare(name, &signature)?;
        self.context.clear();
        self.context.func.signature = signature;
        self.context.func.name = UserFuncName::user(0, id.as_u32());
        let mut b = FunctionBuilder::new(&mut self.context.func, &mut self.frontend);
        let entry = b.create_block();
        b.append_block_params_for_function_params(entry);
        b.switch_to_block(entry);
        let params = b.block_params(entry).to_vec();
        let mut emitter = Emitter { b, params, module: &mut self.module, inputs };
        emit(&mut emitter)?;
        let Emitter { mut b, module, .. } = emitter;
        b.seal_all_blocks();
        b.finalize(module.isa().frontend_config());

        let clif = match &self.texts {
            Some(_) => self.context.func.display().to_string(),
            None => String::new(),
        };
        let isa = match kind {
            FunctionKind::Driver => self.module.isa(),
            FunctionKind::Tile => &*self.tile_isa,
        };
        self.context
            .compile(isa, &mut ControlPlane::default())
            .map_err(|e| backend(name, format!("{:?}", e.inner)))?;
        let compiled = self.context.compiled_code().ok_or_else(|| backend(name, "no code"))?;
        let alignment = u64::from(compiled.buffer.alignment);
        let code = compiled.code_buffer().to_vec();
        let relocs: Vec<ModuleReloc> = compiled
            .buffer
            .relocs()
            .iter()
            .map(|r| ModuleReloc::from_mach_reloc(r, &self.context.func, id))
            .collect();
        self.place(name, id, alignment, code, &relocs, clif)?;
        Ok(id)
    }

    /// Registers machine code of another assembler under the convention of [`signature`]. If the same code is there
    /// already, that function is the result.
    pub(crate) fn define_bytes(
        &mut self,
        name: &str,
        parameters: usize,
        code: &[u8],
    ) -> Result<FuncId, CodegenError> {
        if let Some(&id) = self.assembled.get(code) {
            return Ok(id);
        }
        let id = self.declare(name, &signature(parameters))?;
        self.place(name, id, 64, code.to_vec(), &[], String::new())?;
        self.assembled.insert(code.to_vec(), id);
        Ok(id)
    }

    fn place(
        &mut self,
        name: &str,
        id: FuncId,
        alignment: u64,
        code: Vec<u8>,
        relocs: &[ModuleReloc],
        clif: String,
    ) -> Result<(), CodegenError> {
        self.bytes += code.len();
        self.module.define_function_bytes(id, alignment, &code, relocs).map_err(|e| backend(name, e))?;
        if let Some(texts) = &mut self.texts {
            texts.push(FunctionText { name: name.into(), clif, code });
        }
        Ok(())
    }

    /// Makes the code executable. The second result maps functions to their entry points.
    pub(crate) fn finish(mut self) -> Result<(Code, impl Fn(FuncId) -> *const u8), CodegenError> {
        self.module.finalize_definitions().map_err(|e| backend("model", e))?;
        let entries: BTreeMap<FuncId, usize> =
            self.names.values().map(|&id| (id, self.module.get_finalized_function(id) as usize)).collect();
        let code = Code {
            module: Mutex::new(Some(self.module)),
            bytes: self.bytes,
            texts: self.texts.unwrap_or_default(),
        };
        Ok((code, move |id| entries[&id] as *const u8))
    }
}

impl Code {
    /// Bytes of machine code.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn texts(&self) -> &[FunctionText] {
        &self.texts
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        let module = match self.module.get_mut() {
            Ok(module) => module.take(),
            Err(poisoned) => poisoned.into_inner().take(),
        };
        if let Some(module) = module {
            // SAFETY: entry points are only called by `Execution::run`, which holds the model that owns this code, so
            // none of them is running and none can be called again.
            #[allow(unsafe_code, reason = "freeing code is the one thing the module cannot check")]
            unsafe {
                module.free_memory();
            }
        }
    }
}

/// The disassembly of one function. Bytes that are no instruction, such as constants behind it, show as `(bad)`.
pub(crate) fn disassemble(code: &[u8]) -> String {
    let mut formatter = IntelFormatter::new();
    let (mut text, mut instruction) = (String::new(), String::new());
    for i in Decoder::with_ip(64, code, 0, DecoderOptions::NONE).iter() {
        instruction.clear();
        formatter.format(&i, &mut instruction);
        let _ = writeln!(text, "  {:6x}: {instruction}", i.ip());
    }
    text
}

impl Emitter<'_> {
    /// A pointer to the first byte of a value, given the step's context.
    pub(crate) fn address(&mut self, ctx: Value, location: Location) -> Value {
        let pointer = size_of::<usize>() as i32;
        let (base, offset) = match location {
            Location::Arena(offset) => (self.b.ins().load(I64, MEM, ctx, 0), offset),
            Location::Weights(offset) => (self.b.ins().load(I64, MEM, ctx, pointer), u64::from(offset)),
            Location::Input(i) => return self.external(ctx, i),
            Location::Output(i) => return self.external(ctx, self.inputs + i),
        };
        self.b.ins().iadd_imm_s(base, offset as i64)
    }

    fn external(&mut self, ctx: Value, index: usize) -> Value {
        let pointer = size_of::<usize>() as i32;
        let table = self.b.ins().load(I64, MEM, ctx, 2 * pointer);
        self.b.ins().load(I64, MEM, table, index as i32 * pointer)
    }

    /// A function of this module as one that this function can call.
    pub(crate) fn import(&mut self, callee: FuncId) -> FuncRef {
        self.module.declare_func_in_func(callee, self.b.func)
    }
}
