//! The bytes of a `.qcc` file: a checked header, a record, and aligned blobs that are used where they are mapped.
//!
//! All numbers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `89 51 43 43 0D 0A 1A 0A`: not text, and damaged by any conversion of line ends |
//! | 8..12 | version of this layout and of the record |
//! | 12..16 | 0 |
//! | 16..24 | length of the file |
//! | 24..32 | length of the record, which begins at 64 |
//! | 32..40 | number of blobs |
//! | 40..48 | where the table of blobs begins: offset and length of each, 8 bytes both |
//! | 48..56 | checksum of everything from 64 on: XXH3 of the XXH3s, 8 bytes each, of blocks of 1 MiB |
//! | 56..64 | XXH3 of bytes 0..56 |

use bytes::Bytes;
use memmap2::Mmap;
use rayon::prelude::*;
use std::{
    fs::File,
    io::{BufWriter, Read, Write},
    path::Path,
    sync::Arc,
};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

const MAGIC: [u8; 8] = *b"\x89QCC\r\n\x1a\n";
/// Goes up with every change of this layout, or of what is in the record.
const VERSION: u32 = 12;
const HEADER: usize = 64;
/// Alignment of blobs: a cache line, and the widest vector.
const ALIGNMENT: usize = 64;
/// Bytes that are hashed at a time: threads share the blocks of a large file.
const BLOCK: usize = 1 << 20;
/// Bytes of a page of memory. One of more bytes would only be given back less often.
const PAGE: usize = 4096;

/// Why a `.qcc` file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// It cannot be read.
    #[error("cannot read it: {0}")]
    Read(std::io::Error),
    /// It cannot be written.
    #[error("cannot write it: {0}")]
    Write(std::io::Error),
    /// It does not begin like one.
    #[error("this is not a .qcc file")]
    NotOne,
    /// It was written by another version of qcc.
    #[error("format {found}, this qcc reads {VERSION}: compile the model again")]
    Version {
        /// The file's format.
        found: u32,
    },
    /// Its end is missing, or something was appended.
    #[error("{got} bytes long where its header says {expected}: it was cut off or appended to")]
    Length {
        /// Bytes by the header.
        expected: u64,
        /// Bytes of the file.
        got: u64,
    },
    /// Some bytes are not those that were written.
    #[error("its {part} is damaged: the checksum does not fit")]
    Checksum {
        /// Header or contents.
        part: &'static str,
    },
    /// It is another kind of program.
    #[error("its shapes are open: bind them, or run it as a model of any shapes")]
    Dynamic,
    /// The checksums fit, but what it says makes no sense.
    #[error("malformed: {0}")]
    Malformed(String),
}

/// Whether a file is meant to be a `.qcc` file, by its name or its first bytes.
pub fn is_program(path: &Path) -> bool {
    let is_named_so = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("qcc"));
    let mut start = [0; MAGIC.len()];
    is_named_so || File::open(path).and_then(|mut f| f.read_exact(&mut start)).is_ok() && start == MAGIC
}

/// The contents of a file, borrowed from its mapping.
pub(crate) struct Contents {
    pub(crate) record: Bytes,
    pub(crate) blobs: Vec<Bytes>,
    /// The mapping itself; `None` where the bytes are not of a mapped file.
    pub(crate) source: Option<Source>,
}

/// A mapped file.
#[derive(Clone)]
pub(crate) struct Source(Arc<Mmap>);

impl AsRef<[u8]> for Source {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Source {
    /// Gives back the memory of these bytes, if they are the file's. They come from the file again when they are read.
    pub(crate) fn give_back(&self, bytes: &[u8]) {
        let all = self.0.as_ptr_range();
        let own = bytes.as_ptr_range();
        if own.start < all.start || own.end > all.end {
            return;
        }
        let offset = |at: *const u8| at as usize - all.start as usize;
        // Whole pages only: their neighbours hold what others may be reading.
        let (first, end) = (offset(own.start).next_multiple_of(PAGE), offset(own.end) / PAGE * PAGE);
        #[cfg(unix)]
        if first < end {
            // SAFETY: the mapping is of a file, private and never written to, so a page that was dropped holds the same
            // bytes when it is read again. That it fails (where pages are larger) costs memory and nothing else.
            #[allow(
                unsafe_code,
                reason = "the advice would lose what was written to a mapping, and nothing was"
            )]
            let _ = unsafe {
                self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, first, end - first)
            };
        }
    }
}

/// The checksum of what is behind the header.
fn checksum(body: &[u8]) -> u64 {
    let of_blocks: Vec<u64> = match body.len() {
        // Not worth waking a thread.
        0..=BLOCK => body.chunks(BLOCK).map(xxh3_64).collect(),
        _ => body.par_chunks(BLOCK).map(xxh3_64).collect(),
    };
    let mut all = Xxh3::new();
    of_blocks.iter().for_each(|hash| all.update(&hash.to_le_bytes()));
    all.digest()
}

/// Writes a file in one step: a reader sees the old file or the new one, never a part.
pub(crate) fn write(path: &Path, record: &[u8], blobs: &[Bytes]) -> Result<(), ContainerError> {
    let table = (HEADER + record.len()).next_multiple_of(8);
    let mut end = table + blobs.len() * 16;
    let mut entries = Vec::with_capacity(blobs.len());
    for blob in blobs {
        let offset = end.next_multiple_of(ALIGNMENT);
        entries.push((offset, blob.len()));
        end = offset + blob.len();
    }
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(folder).map_err(ContainerError::Write)?;
    let mut body = Body { out: BufWriter::new(file), checksum: Checksum::default(), at: HEADER };
    let written = (|| {
        // Its place; what belongs there is known at the end.
        body.out.write_all(&[0; HEADER])?;
        body.put(record)?;
        body.pad_to(table)?;
        for (offset, length) in &entries {
            body.put(&(*offset as u64).to_le_bytes())?;
            body.put(&(*length as u64).to_le_bytes())?;
        }
        for (blob, (offset, _)) in blobs.iter().zip(&entries) {
            body.pad_to(*offset)?;
            body.put(blob)?;
        }
        let header = header(end, record.len(), blobs.len(), table, body.checksum.finish());
        let mut file = body.out.into_inner().map_err(|e| e.into_error())?;
        std::io::Seek::rewind(&mut file)?;
        file.write_all(&header)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)
    })();
    written.map(drop).map_err(ContainerError::Write)
}

fn header(length: usize, record: usize, blobs: usize, table: usize, hash: u64) -> [u8; HEADER] {
    let mut h = [0; HEADER];
    h[..8].copy_from_slice(&MAGIC);
    h[8..12].copy_from_slice(&VERSION.to_le_bytes());
    for (at, n) in [(16, length), (24, record), (32, blobs), (40, table)] {
        h[at..at + 8].copy_from_slice(&(n as u64).to_le_bytes());
    }
    h[48..56].copy_from_slice(&hash.to_le_bytes());
    let own = xxh3_64(&h[..56]);
    h[56..].copy_from_slice(&own.to_le_bytes());
    h
}

/// What is written behind the header, and its checksum so far.
struct Body<W: Write> {
    out: W,
    checksum: Checksum,
    at: usize,
}

/// The [`checksum`] of bytes that come bit by bit.
#[derive(Default)]
struct Checksum {
    /// Of the blocks that are complete.
    blocks: Xxh3,
    block: Xxh3,
    /// Bytes of the block that is not.
    len: usize,
}

impl Checksum {
    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - self.len));
            self.block.update(now);
            self.len += now.len();
            bytes = later;
            if self.len == BLOCK {
                self.close();
            }
        }
    }

    fn close(&mut self) {
        self.blocks.update(&self.block.digest().to_le_bytes());
        self.block.reset();
        self.len = 0;
    }

    fn finish(mut self) -> u64 {
        if self.len > 0 {
            self.close();
        }
        self.blocks.digest()
    }
}

impl<W: Write> Body<W> {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.checksum.update(bytes);
        self.at += bytes.len();
        self.out.write_all(bytes)
    }
    fn pad_to(&mut self, offset: usize) -> std::io::Result<()> {
        self.put(&[0; ALIGNMENT][..offset - self.at])
    }
}

/// Maps a file and checks all of it.
pub(crate) fn open(path: &Path) -> Result<Contents, ContainerError> {
    let file = File::open(path).map_err(ContainerError::Read)?;
    let length = file.metadata().map_err(ContainerError::Read)?.len();
    if length == 0 {
        // An empty file cannot be mapped.
        return Err(ContainerError::NotOne);
    }
    // SAFETY: the map is private and read-only. What no process can rule out is another one that shortens or rewrites
    // the file while it is mapped; qcc itself only ever replaces such files as a whole (see `write`), which leaves the
    // mapped one as it is.
    #[allow(unsafe_code, reason = "memory maps are unsafe by nature")]
    let map = unsafe { Mmap::map(&file) }.map_err(ContainerError::Read)?;
    let source = Source(Arc::new(map));
    let contents = parse(Bytes::from_owner(source.clone()))?;
    Ok(Contents { source: Some(source), ..contents })
}

/// Checks the bytes of a file and finds its parts.
pub(crate) fn parse(file: Bytes) -> Result<Contents, ContainerError> {
    let common = file.len().min(MAGIC.len());
    if common == 0 || file[..common] != MAGIC[..common] {
        return Err(ContainerError::NotOne);
    }
    let length = file.len() as u64;
    if file.len() < HEADER {
        return Err(ContainerError::Length { expected: HEADER as u64, got: length });
    }
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| file[at + i]));
    // Before the checksum: another version may have another one.
    let version = u32::from_le_bytes(std::array::from_fn(|i| file[8 + i]));
    let header_fits = xxh3_64(&file[..56]) == word(56);
    if version != VERSION && header_fits {
        return Err(ContainerError::Version { found: version });
    }
    if !header_fits {
        return Err(ContainerError::Checksum { part: "header" });
    }
    if word(16) != length {
        return Err(ContainerError::Length { expected: word(16), got: length });
    }
    if checksum(&file[HEADER..]) != word(48) {
        return Err(ContainerError::Checksum { part: "contents" });
    }
    // From here on only a writer with other ideas can be at fault, but its file must not be trusted either.
    let slice = |offset: u64, len: u64| -> Result<Bytes, ContainerError> {
        let end = offset.checked_add(len).filter(|&e| offset >= HEADER as u64 && e <= length);
        match end {
            Some(end) => Ok(file.slice(offset as usize..end as usize)),
            None => Err(ContainerError::Malformed(format!("{len} bytes at {offset} are not in the file"))),
        }
    };
    let record = slice(HEADER as u64, word(24))?;
    let table_bytes = word(32).checked_mul(16);
    let table_bytes = table_bytes.ok_or_else(|| ContainerError::Malformed("too many blobs".into()))?;
    let table = slice(word(40), table_bytes)?;
    let mut blobs = Vec::new();
    for entry in table.chunks_exact(16) {
        let [offset, len] = [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|i| entry[at + i])));
        if !offset.is_multiple_of(ALIGNMENT as u64) {
            return Err(ContainerError::Malformed(format!("a blob at {offset} is not aligned")));
        }
        blobs.push(slice(offset, len)?);
    }
    Ok(Contents { record, blobs, source: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcc");
        write(&path, b"the record", &[Bytes::from_static(b"one"), Bytes::from_static(&[7; 100])]).unwrap();
        std::fs::read(path).unwrap()
    }

    #[test]
    fn what_is_written_is_read_back_aligned() {
        let c = parse(sample().into()).unwrap();
        assert_eq!((&c.record[..], c.blobs.len()), (&b"the record"[..], 2));
        assert_eq!((&c.blobs[0][..], &c.blobs[1][..]), (&b"one"[..], &[7; 100][..]));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcc");
        write(&path, b"", &[Bytes::from_static(b"one")]).unwrap();
        let mapped = open(&path).unwrap();
        assert_eq!(mapped.blobs[0].as_ptr() as usize % ALIGNMENT, 0);
    }

    #[test]
    fn bytes_that_were_given_back_are_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcc");
        let blob: Vec<u8> = (0..10 * PAGE).map(|i| (i % 251) as u8).collect();
        write(&path, b"the record", &[Bytes::from(blob.clone())]).unwrap();
        let mapped = open(&path).unwrap();
        let source = mapped.source.unwrap();
        for part in [&mapped.blobs[0][..], &mapped.blobs[0][PAGE + 7..3 * PAGE], &[], &blob] {
            source.give_back(part);
        }
        assert_eq!((&mapped.blobs[0][..], &mapped.record[..]), (&blob[..], &b"the record"[..]));
    }

    #[test]
    fn a_checksum_does_not_depend_on_how_bytes_come() {
        for len in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5] {
            let bytes: Vec<u8> = (0..len).map(|i| (i % 253) as u8).collect();
            for piece in [999_983, len.max(1)] {
                let mut by_pieces = Checksum::default();
                bytes.chunks(piece).for_each(|c| by_pieces.update(c));
                assert_eq!(by_pieces.finish(), checksum(&bytes), "{len} bytes, {piece} at a time");
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let file = sample();
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(parse(bad.into()).is_err(), "byte {at}");
        }
    }

    #[test]
    fn every_truncation_and_any_appendix_is_found() {
        let file = sample();
        for len in 0..file.len() {
            assert!(parse(file[..len].to_vec().into()).is_err(), "{len} bytes");
        }
        let mut longer = file;
        longer.push(0);
        assert!(matches!(parse(longer.into()), Err(ContainerError::Length { .. })));
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let sealed = |mut f: Vec<u8>| {
            let own = xxh3_64(&f[..56]);
            f[56..64].copy_from_slice(&own.to_le_bytes());
            parse(f.into()).err().unwrap()
        };
        let mut newer = sample();
        newer[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
        assert!(matches!(sealed(newer), ContainerError::Version { found } if found == VERSION + 1));
        let mut lost = sample();
        lost[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(sealed(lost), ContainerError::Malformed(_)));
        let mut blobs = sample();
        blobs[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(sealed(blobs), ContainerError::Malformed(_)));
        assert!(matches!(parse(Bytes::from_static(b"PK\x03\x04")), Err(ContainerError::NotOne)));
        assert!(matches!(parse(Bytes::new()), Err(ContainerError::NotOne)));
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_litter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(write(&path, b"x", &[]), Err(ContainerError::Write(_))));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
