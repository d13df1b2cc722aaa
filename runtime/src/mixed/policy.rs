//! The precision of single layers, as a file that people read and edit.

use qcc_ir::Graph;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, collections::BTreeSet, fmt, io::Write, path::Path};
use toml_edit::{DocumentMut, Item, Table, value};

/// What one layer computes with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerPrecision {
    /// f32.
    Float,
    /// 8-bit integers, where the model as a whole is.
    Int8,
}

impl LayerPrecision {
    const fn name(self) -> &'static str {
        match self {
            LayerPrecision::Float => "float",
            LayerPrecision::Int8 => "int8",
        }
    }
}

/// The precision of layers, by the names of nodes of the prepared graph (those of the plan). Layers that are not named are what
/// the model is.
///
/// As a file it is TOML:
///
/// ```
/// # fn main() -> Result<(), qcc_runtime::PolicyError> {
/// use qcc_runtime::{LayerPrecision, Policy};
///
/// let policy = Policy::parse(
///     r#"
///     [layers]
///     conv1 = "float"          # 14.2 dB when it alone is int8
///     "stage1/conv2" = "int8"
///     "#,
/// )?;
/// assert_eq!(policy.layers["conv1"], LayerPrecision::Float);
/// assert_eq!(policy.float().collect::<Vec<_>>(), ["conv1"]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// By the name of the layer.
    #[serde(default)]
    pub layers: BTreeMap<String, LayerPrecision>,
}

/// What is wrong with a policy.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PolicyError {
    /// It cannot be read.
    #[error("cannot read the policy `{path}`: {reason}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// It cannot be written.
    #[error("cannot write the policy `{path}`: {reason}")]
    Write {
        /// The file.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// It is no policy.
    #[error("{origin} is no policy: {reason}")]
    Malformed {
        /// The file.
        origin: String,
        /// Where, and what was expected.
        reason: String,
    },
    /// It names a layer that the model does not have.
    #[error("the policy names `{layer}`, and no layer of the model is called that{}", did_you_mean(near))]
    UnknownLayer {
        /// The name given.
        layer: String,
        /// Names of the model that are close to it.
        near: Vec<String>,
    },
}

fn did_you_mean(near: &[String]) -> String {
    match near {
        [] => ": names are those of the plan (qcc inspect)".into(),
        names => format!(
            "; did you mean {}?",
            names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
        ),
    }
}

/// Files larger than this are no policies.
const MOST_BYTES: u64 = 16 << 20;

impl Policy {
    /// The layers that stay float.
    pub fn float(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().filter(|(_, p)| **p == LayerPrecision::Float).map(|(name, _)| name.as_str())
    }

    /// A policy that keeps these layers float.
    pub fn of_float(layers: impl IntoIterator<Item = String>) -> Policy {
        Policy { layers: layers.into_iter().map(|name| (name, LayerPrecision::Float)).collect() }
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// Where it is no TOML, has other keys, or other values than `float` and `int8`.
    pub fn parse(text: &str) -> Result<Policy, PolicyError> {
        Policy::parse_from("the text", text)
    }

    fn parse_from(origin: &str, text: &str) -> Result<Policy, PolicyError> {
        let malformed = |e: toml_edit::de::Error| {
            let before = e.span().and_then(|span| text.get(..span.start));
            let line = before.map_or_else(String::new, |b| format!("line {}: ", b.matches('\n').count() + 1));
            let reason = format!("{line}{}", e.message().replace('\n', ", "));
            PolicyError::Malformed { origin: origin.into(), reason }
        };
        toml_edit::de::from_str(text).map_err(malformed)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// Where it cannot be read or is no policy.
    pub fn load(path: &Path) -> Result<Policy, PolicyError> {
        let failed = |reason: String| PolicyError::Read { path: path.display().to_string(), reason };
        let size = std::fs::metadata(path).map_err(|e| failed(e.to_string()))?.len();
        if size > MOST_BYTES {
            return Err(failed(format!("{size} bytes are more than a policy has")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        Policy::parse_from(&format!("`{}`", path.display()), &text)
    }

    /// The text of a file: a head of comments, and the layers in this order, each with a comment. Layers that are not
    /// among them come last.
    pub fn text(&self, head: &str, layers: &[(String, String)]) -> String {
        let mut table = Table::new();
        let told = layers.iter().filter(|(name, _)| self.layers.contains_key(name));
        let rest = self.layers.keys().filter(|name| layers.iter().all(|(n, _)| n != *name));
        let all = told.map(|(n, c)| (n.as_str(), c.as_str())).chain(rest.map(|n| (n.as_str(), "")));
        for (name, comment) in all {
            let mut item = value(self.layers[name].name());
            if let (Some(value), false) = (item.as_value_mut(), comment.is_empty()) {
                value.decor_mut().set_suffix(format!("  # {}", comment.replace(['\n', '\r'], " ")));
            }
            table.insert(name, item);
        }
        let head: String = head.lines().map(|line| format!("# {line}\n")).collect();
        table.decor_mut().set_prefix(format!("{head}\n"));
        let mut document = DocumentMut::new();
        document.insert("layers", Item::Table(table));
        document.to_string()
    }

    /// Writes a text to a file, in one step: an existing file is replaced as a whole or stays as it is.
    ///
    /// # Errors
    /// Where the folder or the disk does not take it.
    pub fn save(path: &Path, text: &str) -> Result<(), PolicyError> {
        let failed = |e: std::io::Error| PolicyError::Write {
            path: path.display().to_string(),
            reason: e.to_string(),
        };
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        file.write_all(text.as_bytes()).map_err(failed)?;
        file.persist(path).map_err(|e| failed(e.error))?;
        Ok(())
    }

    /// # Errors
    /// Where it names a layer that the prepared graph does not have.
    pub fn check(&self, graph: &Graph) -> Result<(), PolicyError> {
        let unknown = |name: &&String| graph.find(name).is_none_or(|n| graph.op(n).is_none());
        match self.layers.keys().find(unknown) {
            None => Ok(()),
            Some(name) => Err(PolicyError::UnknownLayer {
                layer: name.clone(),
                near: qcc_passes::near_names(graph, name),
            }),
        }
    }

    pub(crate) fn pass_option(&self) -> qcc_passes::Layers {
        qcc_passes::Layers::AllBut(self.float().map(String::from).collect::<BTreeSet<_>>())
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text("", &[]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_the_same_after_a_file_whatever_names_are() {
        let names = ["a", "b/c:0", "ü \"x\" = 1", "\n", "layers.x", "# no comment", ""];
        let mut policy = Policy::of_float(names.map(String::from));
        policy.layers.insert("b/c:0".into(), LayerPrecision::Int8);
        let told = [("b/c:0".to_string(), "12.0 dB\nalone".to_string()), ("gone".into(), "x".into())];
        let text = policy.text("why\nit is so", &told);
        assert!(
            text.starts_with("# why\n# it is so\n\n[layers]\n\"b/c:0\" = \"int8\"  # 12.0 dB alone\n"),
            "{text}"
        );
        assert_eq!(Policy::parse(&text).unwrap(), policy);
        assert_eq!(Policy::parse(&policy.to_string()).unwrap(), policy);
        assert_eq!(Policy::parse("").unwrap(), Policy::default());
    }

    #[test]
    fn what_is_no_policy_is_told_with_its_line() {
        for (text, what) in [
            ("[layers]\na = \"int4\"", "int4"),
            ("[layers]\na = 8", "line 2"),
            ("layers = 3", "line 1: invalid type"),
            ("[layer]\na = \"float\"", "layer"),
            ("[layers", "line 1"),
            ("[layers]\na = \"float\"\na = \"int8\"", "line 3"),
        ] {
            let error = Policy::parse(text).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("no policy"), "{text:?}: {error}");
        }
        let missing = Policy::load(Path::new("no such file")).unwrap_err().to_string();
        assert!(missing.contains("no such file"), "{missing}");
    }
}
