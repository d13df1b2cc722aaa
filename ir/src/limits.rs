//! Bounds on what a model may ask for. Models are untrusted: a few bytes can name a tensor of any size.

/// The memory that a model may take where nobody says otherwise. The runtime takes what the machine has, if that is less.
pub const MAX_MEMORY_BYTES: u64 = 64 << 30;

/// The largest rank of a tensor. ONNX models stay below 9; a bound keeps index arithmetic small.
pub const MAX_RANK: usize = 16;

/// The largest number of elements of a tensor; byte counts of every type then fit easily into 64 bits.
pub const MAX_ELEMENTS: usize = 1 << 40;

/// The largest tensor, in bytes.
pub const MAX_TENSOR_BYTES: usize = 4 << 30;

/// The most taps of a convolution's or pool's window: a global pool over 8192x8192.
pub const MAX_WINDOW_TAPS: usize = 1 << 26;

/// The largest model file. Protocol buffers end at 2 GiB by their own definition; larger weights are external data.
pub const MAX_MODEL_BYTES: usize = 2 << 30;

/// How deep messages of a model file may nest: types, tensors and graphs within attributes. A graph in a graph adds 3.
pub const MAX_NESTING: usize = 64;

/// The memory that the parsed messages of a model file may take beyond [`MAX_PARSED_PER_BYTE`] times its size. An
/// empty message takes two bytes in a file and hundreds in memory, so the length of the file does not bound them.
pub const MAX_PARSED_BYTES: usize = 192 << 20;

/// See [`MAX_PARSED_BYTES`].
pub const MAX_PARSED_PER_BYTE: usize = 4;

/// The largest constant that import computes from smaller ones.
pub const MAX_FOLDED_TENSOR_BYTES: usize = 16 << 20;

/// All constants together that import computes, beyond twice the bytes of the model's own weights.
pub const MAX_FOLDED_BYTES: usize = 128 << 20;

/// The most multiply-accumulate operations that import spends on one node with constant operands.
pub const MAX_FOLDED_MACS: u64 = 1 << 26;

/// The largest tensor that a sparse one is made into.
pub const MAX_DENSE_BYTES: usize = 64 << 20;

/// The most operands of a node.
pub const MAX_OPERANDS: usize = 1 << 16;

/// The most bytes of constants that a text may have generated for it (`splat`, `seed`).
pub const MAX_GENERATED_BYTES: usize = 1 << 30;

/// The largest value, in elements, that decides over shapes or over what is computed without being a constant: a graph is
/// specialised to it.
pub const MAX_KNOWN_ELEMENTS: usize = 4096;

/// The most nodes of branches and loops, each as often as it is taken, that import puts in the place of others.
pub const MAX_SPLICED_NODES: usize = 1 << 16;

/// The most nodes of a loop, all rounds together, that are made part of the graph; longer ones run by their definition.
pub const MAX_UNROLLED_NODES: usize = 2048;

/// Ops that its nodes may become, a few dozen each of some. A graph of this many compiles in about two seconds.
pub const MAX_UNROLLED_OPS: usize = 16_384;

/// The most nodes of a scan, all rounds together.
pub const MAX_SCANNED_NODES: usize = 1 << 15;

/// The most nodes of the file and ops that these become, each as often as it is computed, of loops that run by their
/// definition.
pub const MAX_LOOP_NODES: u64 = 1 << 18;

/// The most multiply-accumulates, taps of windows and elements of operands and results in them.
pub const MAX_LOOP_OPERATIONS: u64 = 1 << 30;

/// The most work of a loop that runs by its definition, all rounds and the loops in it together: multiply-accumulates and
/// elements of results, and [`LOOP_NODE_WORK`] for each node. It keeps the longest loop to seconds.
pub const MAX_LOOP_WORK: u64 = 1 << 32;

/// The work of a node besides what it computes: it is imported anew in each round.
pub const LOOP_NODE_WORK: u64 = 1 << 14;

/// The most experts of a mixture: each becomes ops of its own, and all of them compute all tokens.
pub const MAX_EXPERTS: usize = 256;

/// The most tokens of an n-gram that must not come again: each is compared by ops of its own.
pub const MAX_GRAM_TOKENS: usize = 64;

/// How deep functions of a model may call each other.
pub const MAX_CALL_DEPTH: usize = 32;

/// The most nodes that calls of functions are made into, all together.
pub const MAX_EXPANDED_NODES: usize = 1 << 16;
