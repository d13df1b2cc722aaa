//! What stands around the steps of a recurrence: they are repeated for each time step, on fixed places in memory, and
//! rows of operands and results move there and away.

use crate::{module::Location, routine::Source};
use qcc_ir::{DType, OpError, ops::Recurrent};

/// The frame of a recurrence over `steps` time steps of `sequences` sequences. Rows are those of one sequence.
#[derive(Clone, Debug)]
pub(crate) struct Recurrence {
    pub(crate) steps: usize,
    pub(crate) sequences: usize,
    /// Whether steps are taken from the last one of a sequence to the first.
    pub(crate) reverse: bool,
    /// How many steps each sequence has; all, if nothing is said.
    pub(crate) lengths: Option<Lengths>,
    /// Rows that a step reads.
    pub(crate) input: Input,
    /// What steps remember. The first one is what they result in, too.
    pub(crate) states: Vec<State>,
    /// The first state after each step: `[steps, sequences, …]`, 0 behind the end of a sequence.
    pub(crate) all: Location,
}

/// Integers, one a sequence.
#[derive(Clone, Debug)]
pub(crate) struct Lengths {
    pub(crate) at: Source,
    /// s32 or s64.
    pub(crate) dtype: DType,
}

/// An operand `[steps, sequences, …]`, of which each step finds its rows in one place.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) from: Source,
    pub(crate) to: Location,
    pub(crate) row_bytes: usize,
}

/// Something that is remembered from step to step: `[sequences, …]`.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) initial: Source,
    /// Where a step finds it.
    pub(crate) now: Location,
    /// Where a step leaves it.
    pub(crate) next: Location,
    /// The result: what it is after the last step of each sequence.
    pub(crate) last: Location,
    pub(crate) row_bytes: usize,
}

impl Recurrence {
    /// Goes through the time steps. `resolve` gives addresses; `body` computes a step.
    ///
    /// # Errors
    /// Where a length is not one of a sequence, and those of the body.
    ///
    /// # Safety
    /// The addresses must be those of buffers that the plan has made, large enough for all rows, that do not overlap, and
    /// that nobody else uses meanwhile.
    #[allow(unsafe_code, reason = "rows move within the arena by address, as in machine code")]
    pub(crate) unsafe fn run<E>(
        &self,
        resolve: impl Fn(Location) -> *mut u8,
        refuse: impl FnOnce(OpError) -> E,
        mut body: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let (from, to, all) = (self.input.from.address(&resolve), resolve(self.input.to), resolve(self.all));
        let copy = |from: *const u8, to: *mut u8, row: usize, to_row: usize, rows: usize, bytes: usize| {
            // SAFETY: the caller's promise: both have these rows.
            unsafe {
                to.add(to_row * bytes).copy_from_nonoverlapping(from.add(row * bytes), rows * bytes);
            }
        };
        // SAFETY: the lengths are alive, one for each sequence.
        let lengths = match unsafe { self.lengths(&resolve) } {
            Ok(lengths) => lengths,
            Err(e) => return Err(refuse(e)),
        };
        for state in &self.states {
            let initial = state.initial.address(&resolve);
            for to in [state.now, state.last] {
                copy(initial, resolve(to), 0, 0, self.sequences, state.row_bytes);
            }
        }
        let state_bytes = self.states.first().map_or(0, |s| s.row_bytes);
        if lengths.is_some() {
            // SAFETY: it has so many rows.
            unsafe { all.write_bytes(0, self.steps * self.sequences * state_bytes) };
        }
        let first = self.states.first().map(|s| resolve(s.next).cast_const());
        let longest = lengths.as_ref().map_or(self.steps, |l| l.iter().copied().max().unwrap_or(0));
        for i in 0..longest {
            match &lengths {
                None => {
                    let row = self.time(i, self.steps) * self.sequences;
                    copy(from, to, row, 0, self.sequences, self.input.row_bytes);
                }
                Some(lengths) => {
                    for (b, &length) in lengths.iter().enumerate().filter(|(_, n)| i < **n) {
                        let row = self.time(i, length) * self.sequences + b;
                        copy(from, to, row, b, 1, self.input.row_bytes);
                    }
                }
            }
            body()?;
            for state in &self.states {
                copy(resolve(state.next), resolve(state.now), 0, 0, self.sequences, state.row_bytes);
            }
            let Some(first) = first else { continue };
            match &lengths {
                None => {
                    let row = self.time(i, self.steps) * self.sequences;
                    copy(first, all, 0, row, self.sequences, state_bytes);
                }
                Some(lengths) => {
                    for (b, &length) in lengths.iter().enumerate().filter(|(_, n)| i < **n) {
                        let row = self.time(i, length) * self.sequences + b;
                        copy(first, all, b, row, 1, state_bytes);
                        for state in self.states.iter().filter(|_| i + 1 == length) {
                            copy(resolve(state.next), resolve(state.last), b, b, 1, state.row_bytes);
                        }
                    }
                }
            }
        }
        if lengths.is_none() {
            for state in &self.states {
                copy(resolve(state.now), resolve(state.last), 0, 0, self.sequences, state.row_bytes);
            }
        }
        Ok(())
    }

    /// The time of step i of a sequence.
    fn time(&self, i: usize, length: usize) -> usize {
        if self.reverse { length - 1 - i } else { i }
    }

    /// # Safety
    /// As [`run`](Self::run).
    #[allow(unsafe_code, reason = "values are read by address")]
    unsafe fn lengths(&self, resolve: &impl Fn(Location) -> *mut u8) -> Result<Option<Vec<usize>>, OpError> {
        let Some(lengths) = &self.lengths else { return Ok(None) };
        let at = lengths.at.address(resolve);
        let length = |b: usize| {
            // SAFETY: there is one for each sequence.
            let length = unsafe {
                match lengths.dtype {
                    DType::S32 => i64::from(at.cast::<i32>().add(b).read_unaligned()),
                    _ => at.cast::<i64>().add(b).read_unaligned(),
                }
            };
            Recurrent::length(b, length, self.steps)
        };
        (0..self.sequences).map(length).collect::<Result<Vec<_>, _>>().map(Some)
    }
}
