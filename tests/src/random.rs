//! Pseudo-random numbers of a seed.

/// A generator of numbers that are the same for each seed: SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Any 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// An element; `None` of none.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        if of.is_empty() { None } else { Some(&of[self.below(of.len())]) }
    }

    pub(crate) fn index<T>(&mut self, of: &[T]) -> Option<usize> {
        if of.is_empty() { None } else { Some(self.below(of.len())) }
    }

    /// An integer at which something may wrap, overflow or be of the wrong sign.
    pub(crate) fn odd_int(&mut self) -> i64 {
        const ODD: [i64; 30] = [
            0,
            1,
            -1,
            2,
            -2,
            3,
            4,
            5,
            7,
            8,
            9,
            16,
            17,
            31,
            32,
            33,
            63,
            64,
            65,
            127,
            128,
            255,
            256,
            65_535,
            65_536,
            i32::MAX as i64,
            i32::MIN as i64,
            1 << 40,
            i64::MAX,
            i64::MIN,
        ];
        match self.below(8) {
            0 => self.bits() as i64,
            1 => 1 << self.below(63),
            2 => (1i64 << self.below(63)).wrapping_sub(1),
            // Mostly small, so that the mutant gets far.
            3..=5 => ODD[self.below(10)],
            _ => ODD[self.below(ODD.len())],
        }
    }

    pub(crate) fn odd_float(&mut self) -> f32 {
        const ODD: [f32; 14] = [
            0.0,
            -0.0,
            1.0,
            -1.0,
            0.5,
            2.0,
            1e-45,
            1e-38,
            1e10,
            1e30,
            f32::MAX,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
        ];
        match self.below(4) {
            0 => f32::from_bits(self.bits() as u32),
            _ => ODD[self.below(ODD.len())],
        }
    }
}
