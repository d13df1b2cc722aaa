//! Machine code of one model.
//!
//! The thread that lowers a graph defines its functions one by one; others compile and assemble them meanwhile. Then they
//! are placed in one mapping, in the order of their definition, so that the same bytes come out whoever made them. The
//! mapping is writable until it is sealed by [`Functions::seal`] and executable afterwards, never both.

use crate::{CodegenError, Tier, times::ThreadTime};
use cranelift_codegen::{
    Context,
    control::ControlPlane,
    ir::{
        AbiParam, ExtFuncData, ExternalName, FuncRef, Function, InstBuilder, MemFlagsData, Signature,
        UserExternalName, UserFuncName, Value, types::I64,
    },
    isa::{CallConv, OwnedTargetIsa},
    settings::{self, Configurable},
};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use cranelift_jit::{ArenaMemoryProvider, JITBuilder, JITModule};
use cranelift_module::{FuncId, Linkage, Module, ModuleReloc, ModuleRelocTarget};
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use rayon::Scope;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{Display, Write},
    sync::{Arc, Mutex, OnceLock},
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

/// Cranelift's targets for one tier.
struct Target {
    driver: OwnedTargetIsa,
    tile: OwnedTargetIsa,
}

impl Target {
    fn isa(&self, kind: FunctionKind) -> &OwnedTargetIsa {
        match kind {
            FunctionKind::Driver => &self.driver,
            FunctionKind::Tile => &self.tile,
        }
    }
}

/// Machine code of one function, not yet placed.
struct Machine {
    code: Vec<u8>,
    alignment: u64,
    relocs: Vec<ModuleReloc>,
}

/// A function that was defined, whose code some thread is making.
struct Defined {
    name: String,
    parameters: usize,
    /// Text of its CLIF, where it is kept.
    clif: String,
    /// Whether the code is the same wherever it lies.
    is_assembled: bool,
    machine: Arc<OnceLock<Result<Machine, CodegenError>>>,
}

/// The functions of a model, by [`FuncId`] in the order of their definition.
pub(crate) struct Functions {
    target: Arc<Target>,
    defined: Vec<Defined>,
    keep_texts: bool,
}

/// The code of a model under construction, for the time in which `workers` make it.
pub(crate) struct CodeBuilder<'w, 's> {
    workers: &'w Scope<'s>,
    /// What making code takes.
    time: &'s ThreadTime,
    functions: Functions,
    frontend: FunctionBuilderContext,
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
    defined: &'a [Defined],
    inputs: usize,
}

fn backend(function: &str, reason: impl Display) -> CodegenError {
    CodegenError::Backend { function: function.into(), reason: reason.to_string() }
}

fn isa(tier: &Tier, kind: FunctionKind) -> Result<OwnedTargetIsa, CodegenError> {
    let fail = |e: &dyn Display| backend("target", e);
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

impl<'w, 's> CodeBuilder<'w, 's> {
    pub(crate) fn new(
        tier: &Tier,
        keep_texts: bool,
        workers: &'w Scope<'s>,
        time: &'s ThreadTime,
    ) -> Result<CodeBuilder<'w, 's>, CodegenError> {
        let target =
            Target { driver: isa(tier, FunctionKind::Driver)?, tile: isa(tier, FunctionKind::Tile)? };
        Ok(CodeBuilder {
            workers,
            time,
            functions: Functions { target: Arc::new(target), defined: Vec::new(), keep_texts },
            frontend: FunctionBuilderContext::new(),
        })
    }

    /// Adds a function whose code `make` gives, on any thread.
    fn define(
        &mut self,
        name: &str,
        parameters: usize,
        clif: String,
        is_assembled: bool,
        make: impl FnOnce() -> Result<Machine, CodegenError> + Send + 's,
    ) -> FuncId {
        let id = FuncId::from_u32(self.functions.defined.len() as u32);
        let machine = Arc::new(OnceLock::new());
        let (made, time) = (machine.clone(), self.time);
        self.workers.spawn(move |_| {
            // Nobody else sets it.
            let _ = made.set(time.of(make));
        });
        self.functions.defined.push(Defined { name: name.into(), parameters, clif, is_assembled, machine });
        id
    }

    /// Builds a function, to be compiled. `emit` starts in the entry block and must end every block, the last with a
    /// return.
    pub(crate) fn define_function(
        &mut self,
        name: &str,
        kind: FunctionKind,
        parameters: usize,
        inputs: usize,
        emit: impl FnOnce(&mut Emitter) -> Result<(), CodegenError>,
    ) -> Result<FuncId, CodegenError> {
        let id = FuncId::from_u32(self.functions.defined.len() as u32);
        let own_name = UserFuncName::user(0, id.as_u32());
        let mut function = Function::with_name_signature(own_name, signature(parameters));
        let mut b = FunctionBuilder::new(&mut function, &mut self.frontend);
        let entry = b.create_block();
        b.append_block_params_for_function_params(entry);
        b.switch_to_block(entry);
        let params = b.block_params(entry).to_vec();
        let mut emitter = Emitter { b, params, defined: &self.functions.defined, inputs };
        emit(&mut emitter)?;
        let Emitter { mut b, .. } = emitter;
        b.seal_all_blocks();
        let target = self.functions.target.clone();
        b.finalize(target.isa(kind).frontend_config());
        let clif = if self.functions.keep_texts { function.display().to_string() } else { String::new() };
        let described = name.to_string();
        Ok(self.define(name, parameters, clif, false, move || {
            compile(function, id, target.isa(kind)).map_err(|reason| backend(&described, reason))
        }))
    }

    /// Adds a function whose machine code `assemble` gives, on any thread, under the convention of [`signature`]. The
    /// code must not depend on where it lies.
    pub(crate) fn define_assembled<E: Display>(
        &mut self,
        name: &str,
        parameters: usize,
        assemble: impl FnOnce() -> Result<Vec<u8>, E> + Send + 's,
    ) -> FuncId {
        let described = name.to_string();
        self.define(name, parameters, String::new(), true, move || {
            let code = assemble().map_err(|reason| backend(&described, reason))?;
            Ok(Machine { code, alignment: 64, relocs: Vec::new() })
        })
    }

    /// The functions, complete once the workers are done.
    pub(crate) fn into_functions(self) -> Functions {
        self.functions
    }
}

/// Compiles one function.
fn compile(function: Function, id: FuncId, isa: &OwnedTargetIsa) -> Result<Machine, String> {
    let mut context = Context::for_function(function);
    context.compile(&**isa, &mut ControlPlane::default()).map_err(|e| format!("{:?}", e.inner))?;
    let compiled = context.compiled_code().ok_or("no code")?;
    let relocs = compiled.buffer.relocs().iter();
    Ok(Machine {
        code: compiled.code_buffer().to_vec(),
        alignment: u64::from(compiled.buffer.alignment),
        relocs: relocs.map(|r| ModuleReloc::from_mach_reloc(r, &context.func, id)).collect(),
    })
}

impl Functions {
    /// Places the code and makes it executable. The second result maps functions to their entry points.
    ///
    /// Of assembled functions with the same code only the first is placed. Names are made unique.
    pub(crate) fn seal(self) -> Result<(Code, impl Fn(FuncId) -> *const u8), CodegenError> {
        let memory = ArenaMemoryProvider::new_with_size(CODE_SPACE).map_err(|e| backend("memory", e))?;
        let libcalls = cranelift_module::default_libcall_names();
        let mut builder = JITBuilder::with_isa(self.target.driver.clone(), libcalls);
        builder.memory_provider(Box::new(memory));
        let mut module = JITModule::new(builder);
        // By number of the definition, the function in the module.
        let mut placed: Vec<FuncId> = Vec::with_capacity(self.defined.len());
        let (mut names, mut assembled) = (BTreeSet::new(), BTreeMap::new());
        let (mut bytes, mut texts) = (0, Vec::new());
        for function in &self.defined {
            let machine = match function.machine.get() {
                Some(made) => made.as_ref().map_err(Clone::clone)?,
                None => return Err(backend(&function.name, "its code was not made")),
            };
            if let (true, Some(&same)) = (function.is_assembled, assembled.get(&machine.code)) {
                placed.push(same);
                continue;
            }
            let name = unique(&function.name, &names);
            let fail = |e| backend(&name, e);
            let signature = signature(function.parameters);
            let id = module.declare_function(&name, Linkage::Local, &signature).map_err(fail)?;
            placed.push(id);
            let relocs: Vec<ModuleReloc> = machine.relocs.iter().map(|r| relocated(r, &placed)).collect();
            module.define_function_bytes(id, machine.alignment, &machine.code, &relocs).map_err(fail)?;
            bytes += machine.code.len();
            if self.keep_texts {
                let (clif, code) = (function.clif.clone(), machine.code.clone());
                texts.push(FunctionText { name: name.clone(), clif, code });
            }
            if function.is_assembled {
                assembled.insert(&machine.code, id);
            }
            names.insert(name);
        }
        module.finalize_definitions().map_err(|e| backend("model", e))?;
        let entries: Vec<usize> =
            placed.into_iter().map(|id| module.get_finalized_function(id) as usize).collect();
        let code = Code { module: Mutex::new(Some(module)), bytes, texts };
        Ok((code, move |id: FuncId| entries[id.as_u32() as usize] as *const u8))
    }
}

/// `name`, or with the first suffix that makes it free. A node has a handful of functions: this ends at once.
fn unique(name: &str, taken: &BTreeSet<String>) -> String {
    let suffixed = (1..).map(|i| format!("{name}_{i}"));
    let mut candidates = std::iter::once(name.to_string()).chain(suffixed);
    candidates.find(|candidate| !taken.contains(candidate)).unwrap_or_default()
}

/// A relocation with functions as the module numbers them.
fn relocated(reloc: &ModuleReloc, placed: &[FuncId]) -> ModuleReloc {
    let in_module = |defined: u32| placed[defined as usize];
    let name = match reloc.name {
        ModuleRelocTarget::User { namespace, index } => {
            ModuleRelocTarget::User { namespace, index: in_module(index).as_u32() }
        }
        ModuleRelocTarget::FunctionOffset(id, offset) => {
            ModuleRelocTarget::FunctionOffset(in_module(id.as_u32()), offset)
        }
        ref other => other.clone(),
    };
    ModuleReloc { name, ..reloc.clone() }
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

    /// A function that was defined before as one that this function can call.
    pub(crate) fn import(&mut self, callee: FuncId) -> FuncRef {
        let index = callee.as_u32();
        let signature = self.b.func.import_signature(signature(self.defined[index as usize].parameters));
        let name = self.b.func.declare_imported_user_function(UserExternalName { namespace: 0, index });
        let name = ExternalName::user(name);
        self.b.func.import_function(ExtFuncData { name, signature, colocated: true, patchable: false })
    }
}
