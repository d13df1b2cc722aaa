//! A function of elements recorded as a straight-line program, and its registers.

use super::super::lanes::{Elementwise, FloatComparison, IntegerComparison, Lanes, pair};
use crate::dense::asm::vector::{Mask, Reg, Width};
use std::collections::HashMap;

/// An operation, by its number in the program.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Id(usize);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Operation {
    /// The elements of an operand.
    Operand(usize),
    /// The same 32 bits in all lanes.
    Constant(u32),
    Unary(Unary, Id),
    Binary(Binary, Id, Id),
    /// x·y + z, rounded once.
    MultiplyAdd(Id, Id, Id),
    Shift(Shift, Id, u32),
    /// Gives a mask.
    Compare(Comparison, Id, Id),
    Select {
        mask: Id,
        yes: Id,
        no: Id,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Unary {
    Sqrt,
    Floor,
    Ceil,
    Nearest,
    Truncate,
    Round,
    ToF32,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Binary {
    FAdd,
    FSub,
    FMul,
    FDiv,
    Larger,
    Smaller,
    IAdd,
    ISub,
    IMul,
    IMax,
    IMin,
    And,
    Or,
    Xor,
    /// Sums of the products of neighbouring 16-bit lanes.
    PairProduct,
}

impl Binary {
    /// Whether operands may change places; of two NaNs another one is the result then.
    fn commutes(self) -> bool {
        use Binary::*;
        !matches!(self, FSub | FDiv | Larger | Smaller | ISub)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Shift {
    Left,
    /// With the sign.
    Right,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Comparison {
    F32(FloatComparison),
    I32(IntegerComparison),
}

/// Records operations; equal ones are one.
#[derive(Default)]
struct Recorder {
    operations: Vec<Operation>,
    ids: HashMap<Operation, Id>,
}

impl Recorder {
    fn add(&mut self, operation: Operation) -> Id {
        *self.ids.entry(operation).or_insert_with(|| {
            self.operations.push(operation);
            Id(self.operations.len() - 1)
        })
    }
}

macro_rules! unary {
    ($($name:ident = $kind:ident;)*) => { $(
        fn $name(&mut self, x: Id) -> Id {
            self.add(Operation::Unary(Unary::$kind, x))
        }
    )* };
}

macro_rules! binary {
    ($($name:ident = $kind:ident;)*) => { $(
        fn $name(&mut self, x: Id, y: Id) -> Id {
            self.add(Operation::Binary(Binary::$kind, x, y))
        }
    )* };
}

impl Lanes for Recorder {
    type Value = Id;

    fn f32(&mut self, x: f32) -> Id {
        self.add(Operation::Constant(x.to_bits()))
    }

    fn i32(&mut self, x: i32) -> Id {
        self.add(Operation::Constant(x as u32))
    }

    unary! {
        sqrt = Sqrt;
        floor = Floor;
        ceil = Ceil;
        nearest = Nearest;
        truncate = Truncate;
        round = Round;
        to_f32 = ToF32;
    }

    binary! {
        fadd = FAdd;
        fsub = FSub;
        fmul = FMul;
        fdiv = FDiv;
        larger = Larger;
        smaller = Smaller;
        iadd = IAdd;
        isub = ISub;
        imul = IMul;
        imax = IMax;
        imin = IMin;
        and = And;
        or = Or;
        xor = Xor;
    }

    fn abs(&mut self, x: Id) -> Id {
        let magnitude = self.i32(i32::MAX);
        self.and(x, magnitude)
    }

    fn neg(&mut self, x: Id) -> Id {
        let sign = self.i32(i32::MIN);
        self.xor(x, sign)
    }

    fn shift_left(&mut self, x: Id, count: u32) -> Id {
        self.add(Operation::Shift(Shift::Left, x, count))
    }

    fn shift_right(&mut self, x: Id, count: u32) -> Id {
        self.add(Operation::Shift(Shift::Right, x, count))
    }

    fn multiply_add(&mut self, x: Id, y: Id, z: Id) -> Id {
        self.add(Operation::MultiplyAdd(x, y, z))
    }

    fn weighted_sum(&mut self, x: Id, y: Id, m1: i16, m2: i16) -> Id {
        let high = self.shift_left(y, 16);
        let both = self.or(x, high);
        let factors = self.i32(pair(m1, m2));
        self.add(Operation::Binary(Binary::PairProduct, both, factors))
    }

    fn as_i32(&mut self, x: Id) -> Id {
        x
    }

    fn as_f32(&mut self, x: Id) -> Id {
        x
    }

    fn compare_f32(&mut self, how: FloatComparison, x: Id, y: Id) -> Id {
        self.add(Operation::Compare(Comparison::F32(how), x, y))
    }

    fn compare_i32(&mut self, how: IntegerComparison, x: Id, y: Id) -> Id {
        self.add(Operation::Compare(Comparison::I32(how), x, y))
    }

    fn select(&mut self, mask: Id, yes: Id, no: Id) -> Id {
        self.add(Operation::Select { mask, yes, no })
    }
}

/// Where an instruction finds a vector.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Register(Reg),
    /// A vector of this constant in memory.
    Constant(usize),
}

/// The register of a value. Masks have registers of their own kind on 512 bits, and are vectors on 256.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Vector(Reg),
    Mask(Mask),
}

impl Place {
    fn vector(self) -> Option<Reg> {
        match self {
            Place::Vector(reg) => Some(reg),
            Place::Mask(_) => None,
        }
    }

    fn mask(self) -> Option<Mask> {
        match self {
            Place::Vector(_) => None,
            Place::Mask(mask) => Some(mask),
        }
    }
}

/// An operation on registers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Instruction {
    Load {
        operand: usize,
    },
    LoadConstant {
        constant: usize,
    },
    Unary {
        kind: Unary,
        x: Source,
    },
    Binary {
        kind: Binary,
        x: Reg,
        y: Source,
    },
    /// x·y + z.
    MultiplyAdd {
        x: Reg,
        y: Source,
        z: Reg,
    },
    Shift {
        kind: Shift,
        x: Reg,
        count: u32,
    },
    Compare {
        how: Comparison,
        x: Reg,
        y: Source,
    },
    Select {
        mask: Place,
        yes: Source,
        no: Reg,
    },
}

/// A function of elements for vectors of one width.
pub(super) struct Program {
    /// In order, each with the register of its result.
    pub(super) instructions: Vec<(Instruction, Place)>,
    pub(super) result: Reg,
    /// The bits of each constant.
    pub(super) constants: Vec<u32>,
    /// How many registers it takes, of vectors and of masks: the first ones.
    pub(super) registers: usize,
    pub(super) masks: usize,
}

impl Program {
    /// The program of a function of so many operands; `None` if it takes more registers than there are.
    pub(super) fn new(function: &impl Elementwise, operands: usize, width: Width) -> Option<Program> {
        let mut recorder = Recorder::default();
        let operands: Vec<Id> = (0..operands).map(|i| recorder.add(Operation::Operand(i))).collect();
        let result = function.apply(&mut recorder, &operands);
        Allocation::new(recorder.operations, result, width).program(result)
    }
}

/// Gives registers to values, from the first operation to the last: each from its definition to its last use.
struct Allocation {
    operations: Vec<Operation>,
    /// The last operation that uses each one; `None` of those that nothing needs.
    last_uses: Vec<Option<usize>>,
    places: Vec<Option<Place>>,
    free: Vec<Reg>,
    free_masks: Vec<Mask>,
    has_masks: bool,
    instructions: Vec<(Instruction, Place)>,
    constants: Vec<u32>,
    constant_ids: HashMap<u32, usize>,
}

impl Allocation {
    fn new(operations: Vec<Operation>, result: Id, width: Width) -> Allocation {
        let mut last_uses = vec![None; operations.len()];
        last_uses[result.0] = Some(operations.len());
        for (i, operation) in operations.iter().enumerate().rev() {
            if last_uses[i].is_some() {
                for source in sources(operation) {
                    last_uses[source.0].get_or_insert(i);
                }
            }
        }
        Allocation {
            places: vec![None; operations.len()],
            operations,
            last_uses,
            free: (0..width.registers()).rev().map(Reg).collect(),
            free_masks: (0..width.masks()).rev().map(Mask).collect(),
            has_masks: width.masks() > 0,
            instructions: vec![],
            constants: vec![],
            constant_ids: HashMap::new(),
        }
    }

    fn program(mut self, result: Id) -> Option<Program> {
        for i in 0..self.operations.len() {
            if self.last_uses[i].is_some() {
                self.operation(i)?;
            }
        }
        let result = self.register(result, &mut vec![])?;
        let places = || self.instructions.iter().map(|(_, to)| to);
        let registers = places().filter_map(|p| p.vector()).map(|reg| reg.0 + 1).max().unwrap_or(0);
        let masks = places().filter_map(|p| p.mask()).map(|mask| mask.0 + 1).max().unwrap_or(0);
        Some(Program { registers, masks, result, constants: self.constants, instructions: self.instructions })
    }

    fn operation(&mut self, i: usize) -> Option<()> {
        let operation = self.operations[i];
        let mut loaded = vec![];
        let instruction = match operation {
            // Come with their first use.
            Operation::Operand(_) | Operation::Constant(_) => return Some(()),
            Operation::Unary(kind, x) => Instruction::Unary { kind, x: self.source(x)? },
            Operation::Binary(kind, x, y) => {
                let (x, y) = if kind.commutes() && self.is_constant(x) { (y, x) } else { (x, y) };
                Instruction::Binary { kind, x: self.register(x, &mut loaded)?, y: self.source(y)? }
            }
            Operation::MultiplyAdd(x, y, z) => {
                let (x, y) = if self.is_constant(x) { (y, x) } else { (x, y) };
                Instruction::MultiplyAdd {
                    x: self.register(x, &mut loaded)?,
                    y: self.source(y)?,
                    z: self.register(z, &mut loaded)?,
                }
            }
            Operation::Shift(kind, x, count) => {
                Instruction::Shift { kind, x: self.register(x, &mut loaded)?, count }
            }
            Operation::Compare(how, x, y) => {
                Instruction::Compare { how, x: self.register(x, &mut loaded)?, y: self.source(y)? }
            }
            Operation::Select { mask, yes, no } => Instruction::Select {
                mask: self.places[mask.0]?,
                yes: self.source(yes)?,
                no: self.register(no, &mut loaded)?,
            },
        };
        // The result may be where a source ends.
        self.free.extend(loaded);
        for source in sources(&operation).into_iter().filter(|s| self.last_uses[s.0] == Some(i)) {
            // Taken, since an operation may use it twice.
            match self.places[source.0].take() {
                Some(Place::Vector(reg)) => self.free.push(reg),
                Some(Place::Mask(mask)) => self.free_masks.push(mask),
                None => {}
            }
        }
        let to = match operation {
            Operation::Compare(..) if self.has_masks => Place::Mask(self.free_masks.pop()?),
            _ => Place::Vector(self.free.pop()?),
        };
        self.places[i] = Some(to);
        self.instructions.push((instruction, to));
        Some(())
    }

    fn is_constant(&self, id: Id) -> bool {
        matches!(self.operations[id.0], Operation::Constant(_))
    }

    fn constant(&mut self, bits: u32) -> usize {
        *self.constant_ids.entry(bits).or_insert_with(|| {
            self.constants.push(bits);
            self.constants.len() - 1
        })
    }

    /// The value, in memory if it is a constant.
    fn source(&mut self, id: Id) -> Option<Source> {
        match self.operations[id.0] {
            Operation::Constant(bits) => Some(Source::Constant(self.constant(bits))),
            _ => Some(Source::Register(self.register(id, &mut vec![])?)),
        }
    }

    /// The value in a register. That of a constant is added to `loaded`: it is for one instruction only.
    fn register(&mut self, id: Id, loaded: &mut Vec<Reg>) -> Option<Reg> {
        match self.places[id.0] {
            Some(Place::Vector(reg)) => return Some(reg),
            Some(Place::Mask(_)) => return None,
            None => {}
        }
        let to = self.free.pop()?;
        let instruction = match self.operations[id.0] {
            Operation::Constant(bits) => {
                loaded.push(to);
                Instruction::LoadConstant { constant: self.constant(bits) }
            }
            Operation::Operand(operand) => {
                self.places[id.0] = Some(Place::Vector(to));
                Instruction::Load { operand }
            }
            // Defined before it is used.
            _ => return None,
        };
        self.instructions.push((instruction, Place::Vector(to)));
        Some(to)
    }
}

fn sources(operation: &Operation) -> Vec<Id> {
    match *operation {
        Operation::Operand(_) | Operation::Constant(_) => vec![],
        Operation::Unary(_, x) | Operation::Shift(_, x, _) => vec![x],
        Operation::Binary(_, x, y) | Operation::Compare(_, x, y) => vec![x, y],
        Operation::MultiplyAdd(x, y, z) => vec![x, y, z],
        Operation::Select { mask, yes, no } => vec![mask, yes, no],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::elementwise::UNARY;
    use qcc_ir::ops::UnaryKind;

    #[test]
    fn every_unary_function_has_registers_enough() {
        for kind in UNARY.into_iter().chain([UnaryKind::Not]) {
            for width in [Width::Ymm, Width::Zmm] {
                let program =
                    Program::new(&kind, 1, width).unwrap_or_else(|| panic!("{kind:?} on {width:?}"));
                assert!(program.registers <= width.registers() && program.masks <= width.masks(), "{kind:?}");
            }
        }
    }

    /// More values that are all needed at the end than there are registers.
    struct Hoarder;

    impl Elementwise for Hoarder {
        fn apply<L: Lanes>(&self, l: &mut L, operands: &[L::Value]) -> L::Value {
            let values: Vec<L::Value> = (0..40)
                .map(|i| {
                    let c = l.i32(i);
                    l.iadd(operands[0], c)
                })
                .collect();
            let product = values.iter().fold(values[0], |x, &y| l.imul(x, y));
            values.iter().rev().fold(product, |x, &y| l.xor(x, y))
        }
    }

    #[test]
    fn a_function_with_too_many_values_is_refused() {
        assert!(Program::new(&Hoarder, 1, Width::Zmm).is_none());
    }
}
