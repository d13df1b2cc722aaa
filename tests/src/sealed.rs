//! Damaged `.qcc` files whose checksums fit: what only a writer with other ideas makes, and what checksums do not keep out.

use crate::random::Random;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

const HEADER: usize = 64;
/// What is hashed at a time.
const BLOCK: usize = 1 << 20;

/// Damages the bytes of a file that qcc has written, mostly in its record, and seals them again.
pub fn damage(file: &mut [u8], random: &mut Random) {
    let word = |file: &[u8], at: usize| u64::from_le_bytes(std::array::from_fn(|i| file[at + i]));
    if file.len() <= HEADER {
        return;
    }
    for _ in 0..1 + random.below(4) {
        let record = (word(file, 24) as usize).clamp(1, file.len() - HEADER);
        match random.below(12) {
            // Lengths, counts and offsets.
            0 => {
                let at = 16 + 8 * random.below(4);
                file[at..at + 8].copy_from_slice(&random.odd_int().to_le_bytes());
            }
            // The table of blobs.
            1 => {
                let table = (word(file, 40) as usize).min(file.len() - 8);
                let entries = (word(file, 32) as usize).clamp(1, 1 << 10) * 2;
                let at = table.saturating_add(8 * random.below(entries)).clamp(HEADER, file.len() - 8);
                file[at..at + 8].copy_from_slice(&random.odd_int().to_le_bytes());
            }
            // A blob.
            2 => {
                let at = HEADER + random.below(file.len() - HEADER);
                file[at] = random.bits() as u8;
            }
            // A large number, as the record spells them.
            3 => {
                let at = HEADER + random.below(record);
                let end = (at + 1 + random.below(9)).min(HEADER + record);
                file[at..end].fill(0xff);
            }
            // Small numbers: variants, lengths, indices.
            4..=7 => file[HEADER + random.below(record)] = random.below(16) as u8,
            8 => file[HEADER + random.below(record)] ^= 1 << random.below(8),
            _ => {
                let (from, to) = (HEADER + random.below(record), HEADER + random.below(record));
                file[to] = file[from];
            }
        }
    }
    seal(file);
}

/// Makes the length and both checksums fit, as the layout in `runtime/src/container.rs` has them.
fn seal(file: &mut [u8]) {
    let mut blocks = Xxh3::new();
    file[HEADER..].chunks(BLOCK).for_each(|block| blocks.update(&xxh3_64(block).to_le_bytes()));
    let length = file.len() as u64;
    file[16..24].copy_from_slice(&length.to_le_bytes());
    file[48..56].copy_from_slice(&blocks.digest().to_le_bytes());
    let header = xxh3_64(&file[..56]);
    file[56..64].copy_from_slice(&header.to_le_bytes());
}
