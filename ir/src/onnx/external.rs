//! Weights in files beside the model.
//!
//! The model is untrusted: it must not be able to read what its folder does not hold. So a location is a plain
//! relative path; no part of it may be a symbolic link; and the file must be regular and have one name only, since a
//! hard link could be another name of any file of the same disk.

use crate::memory::MemoryError;
use bytes::Bytes;
use onnx_protobuf::StringStringEntryProto;
use std::{
    collections::BTreeMap,
    fs::{self, File, Metadata},
    io::Read,
    path::{Component, Path, PathBuf},
};

/// The files beside a model, each read once and shared by the tensors in it.
pub(super) struct ExternalFiles {
    /// The model's folder; `None` where the model was not read from a file.
    folder: Option<PathBuf>,
    contents: BTreeMap<PathBuf, Bytes>,
    /// Bytes that tensors at unaligned offsets took, as copies.
    copied: usize,
    /// Bytes that files may still take.
    left: u64,
}

struct Location<'a> {
    path: &'a str,
    offset: usize,
    length: Option<usize>,
}

fn location(entries: &[StringStringEntryProto]) -> Result<Location<'_>, String> {
    let mut found: BTreeMap<&str, &str> = BTreeMap::new();
    for e in entries {
        if found.insert(&e.key, &e.value).is_some() {
            return Err(format!("`{}` is given twice", e.key));
        }
    }
    let number = |key: &str| {
        let parse = |text: &&str| match text.bytes().all(|b| b.is_ascii_digit()) {
            true => text.parse::<usize>().ok(),
            false => None,
        };
        found
            .get(key)
            .map(|text| parse(text).ok_or_else(|| format!("{key} {text:?} is not a number of bytes")))
            .transpose()
    };
    let path = found.get("location").copied().filter(|p| !p.is_empty()).ok_or("has no location")?;
    Ok(Location { path, offset: number("offset")?.unwrap_or(0), length: number("length")? })
}

/// The path below the model's folder, if it is one. Backslashes and colons mean other things on other systems.
fn relative(path: &str) -> Result<PathBuf, String> {
    let plain = |c: Component<'_>| matches!(c, Component::Normal(_) | Component::CurDir);
    if path.contains(['\\', ':', '\0']) || !Path::new(path).components().all(plain) {
        return Err(format!(
            "location {path:?} must be a relative path within the model's folder, without `..`"
        ));
    }
    Ok(Path::new(path).components().filter(|c| matches!(c, Component::Normal(_))).collect())
}

#[cfg(unix)]
fn has_other_names(file: &Metadata) -> bool {
    std::os::unix::fs::MetadataExt::nlink(file) > 1
}

#[cfg(not(unix))]
fn has_other_names(_file: &Metadata) -> bool {
    // The standard library does not tell the number of links there.
    false
}

#[cfg(unix)]
fn same_file(a: &Metadata, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file(a: &Metadata, b: &Metadata) -> bool {
    a.len() == b.len()
}

/// Reads a file below `folder`, refusing links on the way to it.
fn read_within(folder: &Path, path: &Path, allowed: u64) -> Result<Bytes, String> {
    let shown = path.display();
    let failed = |e: std::io::Error| format!("cannot read {shown}: {e}");
    let mut at = folder.to_path_buf();
    let mut seen = None;
    for part in path.components() {
        at.push(part);
        let meta = fs::symlink_metadata(&at).map_err(failed)?;
        if meta.is_symlink() {
            return Err(format!(
                "{shown} leads through a symbolic link, which could lead out of the model's folder"
            ));
        }
        seen = Some(meta);
    }
    let regular = |m: &Metadata| match m {
        m if !m.is_file() => Err(format!("{shown} is not a regular file")),
        m if has_other_names(m) => {
            Err(format!("{shown} has further hard links, so it may be a file from elsewhere; copy it"))
        }
        _ => Ok(()),
    };
    let seen = seen.ok_or_else(|| format!("{shown:?} is not a file name"))?;
    // Before opening: opening a pipe would wait. After it: what was opened must be what was checked.
    regular(&seen)?;
    let mut file = File::open(&at).map_err(failed)?;
    let opened = file.metadata().map_err(failed)?;
    regular(&opened)?;
    if !same_file(&seen, &opened) {
        return Err(format!("{shown} was exchanged while it was read"));
    }
    MemoryError::check(&format!("reading {shown}"), opened.len(), allowed).map_err(|e| e.to_string())?;
    // The length may be that of a sparse file, larger than the disk: what cannot be had is an error, not an abort.
    let mut bytes = Vec::new();
    let length = usize::try_from(opened.len()).unwrap_or(usize::MAX);
    bytes.try_reserve_exact(length).map_err(|_| format!("{shown} does not fit in memory"))?;
    file.by_ref().take(opened.len()).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes.into())
}

impl ExternalFiles {
    /// The files of the folder that the model file is in.
    pub(super) fn beside(model: &Path, max_memory: u64) -> ExternalFiles {
        let folder = match model.parent() {
            Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
            _ => PathBuf::from("."),
        };
        ExternalFiles { folder: Some(folder), contents: BTreeMap::new(), copied: 0, left: max_memory }
    }

    /// No files: external data is refused.
    pub(super) fn none() -> ExternalFiles {
        ExternalFiles { folder: None, contents: BTreeMap::new(), copied: 0, left: 0 }
    }

    /// Tensors that were read before, whose locations are their numbers.
    pub(super) fn of(tensors: &[Bytes]) -> ExternalFiles {
        let contents = tensors.iter().enumerate().map(|(i, t)| (i.to_string().into(), t.clone())).collect();
        ExternalFiles { contents, ..ExternalFiles::none() }
    }

    /// The `expected` bytes at the place that `entries` name.
    pub(super) fn read(
        &mut self,
        entries: &[StringStringEntryProto],
        expected: usize,
    ) -> Result<Bytes, String> {
        let at = location(entries)?;
        let path = relative(at.path)?;
        if let Some(length) = at.length.filter(|&n| n != expected) {
            return Err(format!("length {length}, but the tensor takes {expected} bytes"));
        }
        let file = match self.contents.get(&path) {
            Some(file) => file.clone(),
            None => {
                let folder = self
                    .folder
                    .as_deref()
                    .ok_or("the model was not read from a file, so it has no folder")?;
                let file = read_within(folder, &path, self.left)?;
                self.left = self.left.saturating_sub(file.len() as u64);
                self.contents.insert(path, file.clone());
                file
            }
        };
        let end = at.offset.checked_add(expected).filter(|&end| end <= file.len()).ok_or_else(|| {
            let (offset, path, len) = (at.offset, at.path, file.len());
            format!("{expected} bytes from {offset} run over the end of {path:?}, which has {len}")
        })?;
        let bytes = file.slice(at.offset..end);
        self.account(&bytes)?;
        Ok(bytes)
    }

    /// Tensors at unaligned offsets are copied; many that overlap could take any amount of memory.
    fn account(&mut self, bytes: &Bytes) -> Result<(), String> {
        if !(bytes.as_ptr() as usize).is_multiple_of(align_of::<u64>()) {
            self.copied = self.copied.saturating_add(bytes.len());
        }
        let total: usize = self.contents.values().map(Bytes::len).sum();
        if self.copied > total.saturating_mul(2) {
            return Err("tensors at unaligned offsets overlap in the file many times over".into());
        }
        Ok(())
    }
}
