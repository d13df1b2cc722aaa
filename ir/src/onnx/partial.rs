//! Models of which a part only can be made a graph, since shapes or the course of computation depend on data.

use super::{
    Bindings, ImportError, InputInfo, Model, NodeError,
    body::{Body, NodeDef},
    import::{Held, Importer, Part, Work, is_structure},
    splice,
    value::{Texts, ValueKind},
};
use crate::{DType, NodeId, Tensor, ValueId, limits::MAX_KNOWN_ELEMENTS};
use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    sync::Arc,
};
use typed_arena::Arena;

/// Whether a node needs values themselves, each time anew.
fn is_by_value(error: &ImportError) -> bool {
    matches!(error, ImportError::Node { source: NodeError::ByValue { .. }, .. })
}

/// A node that is computed by its definition as soon as the values of its operands are there.
pub struct Eager {
    model: Model,
    reads: Vec<String>,
}

impl Eager {
    /// `constant` tells operands that are known.
    fn new(of: &Model, def: &NodeDef, constant: impl Fn(&str) -> Option<Tensor>) -> Eager {
        let (mut reads, mut initializers) = (BTreeSet::new(), BTreeMap::new());
        for name in def.reads() {
            match constant(name) {
                Some(tensor) => _ = initializers.insert(name.to_owned(), tensor),
                None => _ = reads.insert(name),
            }
        }
        let outputs = def.outputs.iter().filter(|o| !o.is_empty()).map(|o| (o.clone(), None)).collect();
        let body = Body {
            inputs: Vec::new(),
            outputs,
            initializers,
            nodes: vec![def.clone().into()],
            captures: Vec::new(),
        };
        Eager { model: of.with(Vec::new(), body), reads: reads.into_iter().map(str::to_owned).collect() }
    }

    /// Names of the values that it needs.
    pub fn reads(&self) -> &[String] {
        &self.reads
    }

    /// Its results, by name.
    ///
    /// # Errors
    /// Where the op does not take these values.
    pub fn run(
        &self,
        values: BTreeMap<String, Tensor>,
        texts: &Texts,
    ) -> Result<Vec<(String, Tensor)>, ImportError> {
        let mut body = self.model.body.clone();
        body.initializers.extend(values);
        let model = self.model.with(Vec::new(), body);
        let results = model.evaluate(texts)?;
        Ok(model.outputs().map(str::to_owned).zip(results).collect())
    }
}

/// What is left of a model behind a [`Part`].
pub struct Rest {
    model: Model,
    /// Inputs that come from eager computations: their types are theirs.
    untyped: Vec<String>,
}

impl Rest {
    /// A model of what is left, given the types that values have come out with. Its inputs are values that the part's
    /// graph or its eager computations have made, by name.
    pub fn model(&self, dtype: impl Fn(&str) -> Option<DType>) -> Model {
        let mut inputs = self.model.inputs.clone();
        for name in &self.untyped {
            if let Some(dtype) = dtype(name) {
                let kind = ValueKind::TENSOR;
                inputs.push(InputInfo { name: name.clone(), dtype, dims: None, kind });
            }
        }
        let mut body = self.model.body.clone();
        body.inputs = inputs.iter().map(|i| i.name.clone()).collect();
        self.model.with(inputs, body)
    }
}

impl Model {
    /// The same model with other contents.
    pub(super) fn with(&self, inputs: Vec<InputInfo>, body: Body) -> Model {
        Model {
            name: self.name.clone(),
            ir_version: self.ir_version,
            opsets: self.opsets.clone(),
            inputs,
            body,
            max_memory: self.max_memory,
            texts: self.texts.clone(),
            output_kinds: self.output_kinds.clone(),
        }
    }

    /// The results of a model that has no inputs, by definition.
    ///
    /// # Errors
    /// Where an op does not take its operands.
    pub fn evaluate(&self, texts: &Texts) -> Result<Vec<Tensor>, ImportError> {
        let arena = Arena::new();
        let mut importer = self.importer(&Bindings::default(), &arena)?;
        importer.texts = texts.clone();
        importer.budget = usize::try_from(self.max_memory).unwrap_or(usize::MAX);
        importer.evaluated()
    }

    /// The same as a round of a loop, of which so many bytes may be made.
    pub(super) fn round(
        &self,
        work: &Rc<Work>,
        bytes: usize,
        texts: &Texts,
    ) -> Result<Vec<Tensor>, ImportError> {
        let arena = Arena::new();
        let mut importer = self.importer(&Bindings::default(), &arena)?;
        (importer.in_loop, importer.work, importer.budget) = (true, work.clone(), bytes);
        importer.texts = texts.clone();
        importer.evaluated()
    }
}

impl Importer<'_> {
    /// The results of a model without inputs.
    fn evaluated(mut self) -> Result<Vec<Tensor>, ImportError> {
        self.is_eager = true;
        self.all_nodes()?;
        if let Some((_, reason)) = std::mem::take(&mut self.blocked).into_iter().next() {
            return Err(reason);
        }
        let (graph, _) = self.finish()?;
        let value = |o: &crate::Output| {
            graph.constant_value(o.value).cloned().ok_or_else(|| {
                ImportError::Structure(format!("`{}` cannot be computed without inputs", o.name))
            })
        };
        graph.outputs().iter().map(value).collect()
    }
}

impl Importer<'_> {
    /// Inputs of the model that nodes want to know, directly or through few small values.
    pub(super) fn wanted_inputs(&self) -> Vec<String> {
        let mut wanted = BTreeSet::new();
        for value in self.blocked.iter().filter_map(|(_, e)| self.wanted_value(e)) {
            wanted.extend(self.small_sources(value).unwrap_or_default());
        }
        let known = |id: &NodeId| self.known.contains_key(&id.out());
        let named = wanted.iter().filter(|id| !known(id)).map(|&id| self.graph.node(id).name.clone());
        named.collect()
    }

    fn wanted_value(&self, error: &ImportError) -> Option<ValueId> {
        match error {
            ImportError::Node { source: NodeError::NotConstant { value, .. }, .. } => {
                self.values.get(value.as_str()).copied()
            }
            _ => None,
        }
    }

    fn is_small(&self, value: ValueId) -> bool {
        self.graph.ty(value).shape.elements() <= MAX_KNOWN_ELEMENTS
    }

    /// The inputs behind a value, where all that lies between is small.
    fn small_sources(&self, value: ValueId) -> Option<BTreeSet<NodeId>> {
        let mut sources = BTreeSet::new();
        let (mut pending, mut seen) = (vec![value], BTreeSet::new());
        while let Some(v) = pending.pop() {
            if self.graph.constant_value(v).is_some() || !seen.insert(v) {
                continue;
            }
            // Numbers of texts are those of one run.
            let is_text = self.graph.ty(v).dtype == DType::Str;
            if is_text || !self.is_small(v) || seen.len() > MAX_KNOWN_ELEMENTS {
                return None;
            }
            match self.graph.op(v.node) {
                None => _ = sources.insert(v.node),
                Some(_) => pending.extend(self.graph.operands(v.node)),
            }
        }
        Some(sources)
    }

    /// Whether a node is to be computed by its definition: it needs a value that is large, or one of texts, to which no
    /// graph is specialised.
    fn is_eager_node(&self, error: &ImportError) -> bool {
        let is_text = |value: ValueId| self.graph.ty(value).dtype == DType::Str;
        let wanted = self.wanted_value(error);
        is_by_value(error) || wanted.is_some_and(|value| is_text(value) || !self.is_small(value))
    }

    /// What could be imported, and what could not.
    pub(super) fn part(mut self) -> Result<Part, ImportError> {
        let mut blocked = std::mem::take(&mut self.blocked);
        let is_large = |(_, e): &&(&NodeDef, ImportError)| self.is_eager_node(e);
        // By their first result, which is theirs alone.
        let eager: BTreeSet<&Vec<String>> =
            blocked.iter().filter(is_large).map(|(def, _)| &def.outputs).collect();
        let deferred = std::mem::take(&mut self.deferred);
        let (eager, later): (Vec<&NodeDef>, Vec<&NodeDef>) =
            deferred.iter().partition(|def| eager.contains(&def.outputs));
        let (_, reason) = blocked.swap_remove(0);
        let is_left = |def: &NodeDef| later.iter().any(|l| l.outputs == def.outputs);
        let mut nodes = self.model.body.nodes.iter();
        if eager.is_empty() && self.spliced == 0 && nodes.all(|def| is_structure(def) || is_left(def)) {
            // What is behind this part would be the same again.
            return Err(reason);
        }
        let of_eager: BTreeSet<&str> = eager.iter().flat_map(|d| &d.outputs).map(String::as_str).collect();
        let of_later: BTreeSet<&str> = later.iter().flat_map(|d| &d.outputs).map(String::as_str).collect();
        let wanted: BTreeSet<&str> =
            later.iter().flat_map(|def| def.reads()).chain(self.model.outputs()).collect();
        let read_by_eager = eager.iter().flat_map(|def| def.reads());
        let passed: BTreeSet<&str> = wanted.iter().copied().chain(read_by_eager).collect();
        let (mut inputs, mut initializers) = (Vec::new(), BTreeMap::new());
        let mut structures = Vec::new();
        for name in passed.into_iter().filter(|name| !of_eager.contains(name) && !of_later.contains(name)) {
            let values: Vec<(String, ValueId)> = match self.structures.get(name).cloned() {
                Some(Held::Sequence(elements, dtype)) => {
                    let names: Vec<String> = (0..elements.len()).map(|i| format!("{name}[{i}]")).collect();
                    structures.push(Arc::new(splice::sequence(name, &names, dtype)));
                    names.into_iter().zip(elements).collect()
                }
                Some(Held::Maps(..)) => {
                    return Err(ImportError::Structure(format!("`{name}` is read as maps")));
                }
                Some(Held::Absent) => {
                    structures.push(Arc::new(splice::absent(name)));
                    Vec::new()
                }
                Some(Held::Value(value)) => vec![(name.to_owned(), value)],
                None => self.value(name).into_iter().map(|value| (name.to_owned(), value)).collect(),
            };
            for (name, value) in values {
                match self.graph.constant_value(value) {
                    Some(tensor) => _ = initializers.insert(name, tensor.clone()),
                    None => {
                        let ty = self.graph.ty(value).clone();
                        let dims = Some(ty.shape.iter().map(|&n| super::Dim::Known(n)).collect());
                        self.graph.output(&name, value);
                        inputs.push(InputInfo { name, dtype: ty.dtype, dims, kind: ValueKind::TENSOR });
                    }
                }
            }
        }
        let untyped = wanted.into_iter().filter(|name| of_eager.contains(name)).map(str::to_owned).collect();
        self.graph.remove_dead();
        let body = Body {
            inputs: inputs.iter().map(|i| i.name.clone()).collect(),
            outputs: self.model.body.outputs.clone(),
            initializers,
            nodes: structures.into_iter().chain(later.into_iter().map(|def| def.clone().into())).collect(),
            captures: Vec::new(),
        };
        let rest = Rest { model: self.model.with(inputs, body), untyped };
        let constant = |name: &str| rest.model.body.initializers.get(name).cloned();
        let eager = eager.into_iter().map(|def| Eager::new(self.model, def, constant)).collect();
        Ok(Part { graph: self.graph, eager, rest, reason })
    }
}
