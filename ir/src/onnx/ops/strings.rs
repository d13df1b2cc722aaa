//! Ops that make texts, or numbers of them: they need the texts themselves, so they are computed by value.

use super::compose::Result;
use crate::{
    DType, Element, OpError, Shape, Tensor, ValueId,
    onnx::{NodeError, import::Node},
};
use regex::Regex;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The texts of an operand.
struct TextOperand {
    shape: Shape,
    texts: Vec<Arc<str>>,
}

fn texts(node: &mut Node<'_, '_>, slot: usize, role: &'static str) -> Result<TextOperand> {
    let tensor = node.by_value(slot, role)?;
    if tensor.dtype() != DType::Str {
        return Err(OpError::dtype(format!("{role} must be of texts, got {}", tensor.ty())).into());
    }
    let numbers = tensor.as_slice::<i64>().map_err(OpError::from)?;
    let texts = numbers.iter().map(|&n| node.texts().text(n)).collect::<Option<Vec<_>>>();
    let texts = texts.ok_or_else(|| OpError::dtype(format!("{role} has elements that are no texts")))?;
    Ok(TextOperand { shape: tensor.shape().clone(), texts })
}

/// A result of texts.
fn made(node: &mut Node<'_, '_>, part: &str, shape: Shape, texts: &[String]) -> Result<ValueId> {
    node.take_bytes(texts.iter().map(|t| t.len().saturating_add(32)).sum())?;
    let numbers: Vec<i64> = texts.iter().map(|text| node.texts().number(text)).collect();
    let tensor = Tensor::from_vec_as(DType::Str, shape, numbers).map_err(OpError::from)?;
    Ok(node.constant_part(part, tensor))
}

fn numbers<T: Element>(node: &mut Node<'_, '_>, part: &str, shape: Shape, values: Vec<T>) -> Result<ValueId> {
    let tensor = Tensor::from_vec(shape, values).map_err(OpError::from)?;
    Ok(node.constant_part(part, tensor))
}

/// The place of each text in their order.
pub(super) fn ranks(node: &Node<'_, '_>, x: &Tensor) -> Result<Tensor> {
    let numbers = x.as_slice::<i64>().map_err(OpError::from)?;
    let text = |n: i64| node.texts().text(n).ok_or_else(|| OpError::dtype("an element is no text"));
    // Equal texts have equal numbers.
    let distinct: BTreeSet<i64> = numbers.iter().copied().collect();
    let texts = distinct.into_iter().map(|n| Ok((text(n)?, n)));
    let mut texts = texts.collect::<Result<Vec<(Arc<str>, i64)>, OpError>>()?;
    texts.sort_unstable();
    let places: BTreeMap<i64, i64> = texts.into_iter().map(|(_, n)| n).zip(0..).collect();
    let ranks = numbers.iter().map(|n| places[n]).collect();
    Ok(Tensor::from_vec(x.shape().clone(), ranks).map_err(OpError::from)?)
}

/// Texts joined in pairs, with broadcasting.
pub(super) fn string_concat(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let (a, b) = (texts(node, 0, "X")?, texts(node, 1, "Y")?);
    let shape = a.shape.broadcast(&b.shape);
    let shape = shape.ok_or_else(|| OpError::shape(format!("{:?} and {:?}", a.shape, b.shape)))?;
    let at = |of: &TextOperand, index: usize| -> Arc<str> {
        let (own, steps, all) = (of.shape.strides(), shape.strides(), shape.rank());
        let lead = all - of.shape.rank();
        let axis =
            |d: usize| if of.shape[d] == 1 { 0 } else { index / steps[lead + d] % shape[lead + d] * own[d] };
        of.texts[(0..of.shape.rank()).map(axis).sum::<usize>()].clone()
    };
    let joined: Vec<String> = (0..shape.elements()).map(|i| format!("{}{}", at(&a, i), at(&b, i))).collect();
    made(node, "joined", shape.clone(), &joined)
}

/// The parts of each text between delimiters, or between runs of white space where there is none; filled with empty ones
/// to the most that a text has. And how many each has.
pub(super) fn string_split(node: &mut Node<'_, '_>) -> Result<Vec<ValueId>> {
    let x = texts(node, 0, "X")?;
    let delimiter = node.string("delimiter", "")?;
    let most = node.optional_int("maxsplit")?.and_then(|n| usize::try_from(n).ok());
    let split = |text: &str| -> Vec<String> {
        let parts: Vec<&str> = match (delimiter, most) {
            ("", None) => text.split_whitespace().collect(),
            ("", Some(n)) => by_white_space(text, n),
            (d, None) => text.split(d).collect(),
            (d, Some(n)) => text.splitn(n.saturating_add(1), d).collect(),
        };
        match text {
            "" => Vec::new(),
            _ => parts.into_iter().map(str::to_owned).collect(),
        }
    };
    let parts: Vec<Vec<String>> = x.texts.iter().map(|t| split(t)).collect();
    let width = parts.iter().map(Vec::len).max().unwrap_or(0);
    let counts: Vec<i64> = parts.iter().map(|p| p.len() as i64).collect();
    let shape = Shape::new([x.shape.dims(), &[width]].concat())?;
    node.take_bytes(shape.elements().saturating_mul(32))?;
    let filled: Vec<String> = parts
        .into_iter()
        .flat_map(|mut p| {
            p.resize(width, String::new());
            p
        })
        .collect();
    Ok(vec![made(node, "parts", shape, &filled)?, numbers(node, "counts", x.shape, counts)?])
}

/// At most `n` cuts at runs of white space; the rest is one part, without what leads it.
fn by_white_space(text: &str, n: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim();
    while parts.len() < n {
        let Some(at) = rest.find(char::is_whitespace) else { break };
        parts.push(&rest[..at]);
        rest = rest[at..].trim_start();
    }
    if !rest.is_empty() {
        parts.push(rest);
    }
    parts
}

/// Texts without those that are stop words, in another case; one empty text where none is left.
pub(super) fn string_normalizer(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = texts(node, 0, "X")?;
    node.ignore(&["locale"]);
    let change = match node.string("case_change_action", "NONE")? {
        "NONE" => |text: &str| text.to_owned(),
        "LOWER" => |text: &str| text.to_lowercase(),
        "UPPER" => |text: &str| text.to_uppercase(),
        other => return Err(NodeError::attribute("case_change_action", format!("is {other:?}"))),
    };
    let is_exact = node.flag("is_case_sensitive", false)?;
    let folded = |text: &str| if is_exact { text.to_owned() } else { text.to_lowercase() };
    let stop: BTreeSet<String> =
        node.strings("stopwords")?.unwrap_or_default().iter().map(|s| folded(s)).collect();
    let kept: Vec<String> =
        x.texts.iter().filter(|t| !stop.contains(&folded(t))).map(|t| change(t)).collect();
    let kept = if kept.is_empty() { vec![String::new()] } else { kept };
    let shape = match *x.shape.dims() {
        [_] => Shape::new([kept.len()])?,
        [1, _] => Shape::new([1, kept.len()])?,
        _ => return Err(OpError::shape(format!("takes texts, or one row of them, got {:?}", x.shape)).into()),
    };
    made(node, "normal", shape, &kept)
}

/// Whether whole texts match a pattern.
pub(super) fn regex_full_match(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = texts(node, 0, "X")?;
    let pattern = node.string("pattern", "")?;
    let regex = Regex::new(&format!(r"\A(?:{pattern})\z"));
    let regex =
        regex.map_err(|e| NodeError::attribute("pattern", format!("is not a regular expression: {e}")))?;
    let matches = x.texts.iter().map(|t| u8::from(regex.is_match(t))).collect();
    let tensor = Tensor::from_vec_as::<u8>(DType::Bool, x.shape, matches).map_err(OpError::from)?;
    Ok(node.constant_part("matches", tensor))
}

/// A number of 32 bits for the bytes of each text.
pub(super) fn hashed(node: &mut Node<'_, '_>, to: DType, hash: impl Fn(&[u8]) -> u32) -> Result<ValueId> {
    let x = texts(node, 0, "X")?;
    let hashes = x.texts.iter().map(|text| hash(text.as_bytes()));
    match to {
        DType::U32 => numbers(node, "hashes", x.shape, hashes.collect()),
        _ => numbers::<i32>(node, "hashes", x.shape, hashes.map(|hash| hash as i32).collect()),
    }
}

/// What divides a text into tokens.
type Split = Box<dyn Fn(&str) -> Vec<String>>;

/// The tokens of each text: its parts between separators, or what an expression matches; of `mincharnum` characters at least.
/// Between marks of its start and its end where the attribute asks for them, and filled behind with `pad_value` to the most that
/// a text has.
pub(super) fn tokenizer(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = texts(node, 0, "X")?;
    let marks = node.flag("mark", false)?;
    let shortest = super::lengths("mincharnum", &[node.int("mincharnum", 1)?])?[0];
    let filler = node.string("pad_value", "")?;
    let separators = node.strings("separators")?;
    let expression = node.string("tokenexp", "")?;
    let regex = |name: &str, pattern: &str| {
        Regex::new(pattern)
            .map_err(|e| NodeError::attribute(name, format!("is not a regular expression: {e}")))
    };
    let separators = match &separators {
        Some(all) => Some(all.iter().map(|s| regex("separators", s)).collect::<Result<Vec<Regex>>>()?),
        None => None,
    };
    let expression = match expression {
        "" => None,
        pattern => Some(regex("tokenexp", pattern)?),
    };
    let is_long = move |token: &&str| token.chars().count() >= shortest;
    let split: Split = match (separators, expression) {
        (Some(separators), None) if separators.len() == 1 && separators[0].as_str().is_empty() => {
            Box::new(|text| text.chars().map(String::from).collect())
        }
        (Some(separators), None) => Box::new(move |text| {
            separators.iter().fold(vec![text.to_owned()], |parts, separator| {
                let split = |part: &String| -> Vec<String> {
                    separator.split(part).filter(is_long).map(str::to_owned).collect()
                };
                parts.iter().flat_map(split).collect()
            })
        }),
        (None, Some(expression)) => Box::new(move |text| {
            let found = expression.find_iter(text).map(|found| found.as_str());
            found.filter(|token| !token.is_empty()).filter(is_long).map(str::to_owned).collect()
        }),
        _ => return Err(OpError::attribute("one of separators and tokenexp must be there").into()),
    };
    if !matches!(x.shape.rank(), 1 | 2) {
        return Err(OpError::shape(format!("takes rows of texts, got {:?}", x.shape)).into());
    }
    let rows: Vec<Vec<String>> = x.texts.iter().map(|text| split(text)).collect();
    let most = rows.iter().map(Vec::len).max().unwrap_or(0);
    // Marks stand around tokens alone.
    let marks = marks && most > 0;
    let width = most + if marks { 2 } else { 0 };
    let shape = Shape::new([&x.shape[..], &[width]].concat())?;
    // Few long texts fill the rows of many short ones.
    node.take_bytes(shape.elements().saturating_mul(size_of::<String>()))?;
    let mut all = Vec::with_capacity(shape.elements());
    for row in rows {
        let fillers = most - row.len();
        all.extend(marks.then(|| "\u{2}".to_owned()));
        all.extend(row);
        all.extend(marks.then(|| "\u{3}".to_owned()));
        all.extend(std::iter::repeat_n(filler.to_owned(), fillers));
    }
    made(node, "tokens", shape, &all)
}

/// Numbers as texts, or texts as numbers.
pub(super) fn cast(node: &mut Node<'_, '_>, to: DType) -> Result<ValueId> {
    let x = node.by_value(0, "input")?;
    match (x.dtype(), to) {
        (DType::Str, DType::Str) => Ok(node.constant_part("same", x)),
        (_, DType::Str) => {
            // Text by text: all of them beside each other would take many times the memory of the numbers.
            let mut numbers: Vec<i64> = Vec::new();
            written(&x, &mut |text| {
                node.take_bytes(text.len().saturating_add(32))?;
                numbers.push(node.texts().number(&text));
                Ok(())
            })?;
            let tensor =
                Tensor::from_vec_as(DType::Str, x.shape().clone(), numbers).map_err(OpError::from)?;
            Ok(node.constant_part("texts", tensor))
        }
        _ => {
            let x = texts(node, 0, "input")?;
            if to.is_integer() || to == DType::Bool {
                let parsed: Option<Vec<i64>> = x.texts.iter().map(|t| t.trim().parse().ok()).collect();
                if let Some(parsed) = parsed {
                    let read = numbers(node, "integers", x.shape, parsed)?;
                    return node.cast_to("", to, read);
                }
            }
            let parse = |text: &Arc<str>| {
                number(text).ok_or_else(|| OpError::dtype(format!("{text:?} is no number")))
            };
            let parsed = x.texts.iter().map(parse).collect::<Result<Vec<f64>, OpError>>()?;
            let read = numbers(node, "numbers", x.shape, parsed)?;
            node.cast_to("", to, read)
        }
    }
}

fn number(text: &str) -> Option<f64> {
    let text = text.trim();
    text.parse().ok()
}

/// The shortest text that gives each number again, with an exponent where it is short; as Python writes it.
fn written(x: &Tensor, take: &mut dyn FnMut(String) -> Result<()>) -> Result<()> {
    if let Some(integers) = x.to_i64() {
        let is_bool = x.dtype() == DType::Bool;
        let write = |i: i64| match (is_bool, x.dtype()) {
            (true, _) => if i != 0 { "1" } else { "0" }.into(),
            (_, DType::U64) => (i as u64).to_string(),
            _ => i.to_string(),
        };
        return integers.into_iter().try_for_each(|i| take(write(i)));
    }
    if x.dtype() == DType::F64 {
        let numbers = x.as_slice::<f64>().map_err(OpError::from)?;
        return numbers.iter().try_for_each(|v| take(plain(*v, v.to_string())));
    }
    let floats = x.to_f32().ok_or_else(|| OpError::dtype(format!("{} as texts", x.ty())))?;
    floats.into_iter().try_for_each(|v| take(plain(v.into(), v.to_string())))
}

fn plain(value: f64, shortest: String) -> String {
    match value {
        v if v.is_nan() => "NaN".into(),
        f64::INFINITY => "INF".into(),
        f64::NEG_INFINITY => "-INF".into(),
        v if v != 0.0 && !(1e-5..1e16).contains(&v.abs()) => with_exponent(&shortest),
        _ => shortest,
    }
}

/// Digits without an exponent, as one digit before the point and an exponent of at least two digits.
fn with_exponent(plain: &str) -> String {
    let (sign, digits) = plain.strip_prefix('-').map_or(("", plain), |rest| ("-", rest));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all = format!("{whole}{fraction}");
    let lead = all.len() - all.trim_start_matches('0').len();
    let exponent = whole.len() as i64 - 1 - lead as i64;
    let significant = all.trim_matches('0');
    let (first, rest) = significant.split_at(significant.len().min(1));
    let point = if rest.is_empty() { "" } else { "." };
    let way = if exponent < 0 { '-' } else { '+' };
    format!("{sign}{first}{point}{rest}e{way}{:02}", exponent.abs())
}

/// How often n-grams of a pool stand in each row: tokens `skip + 1` apart, for each distance up to `max_skip_count`.
pub(super) fn tf_idf_vectorizer(node: &mut Node<'_, '_>) -> Result<ValueId> {
    let x = node.by_value(0, "X")?;
    let length = |node: &mut Node<'_, '_>, name: &'static str| -> Result<usize> {
        Ok(super::lengths(name, &[node.int(name, 0)?])?[0])
    };
    let (shortest, longest) = (length(node, "min_gram_length")?, length(node, "max_gram_length")?);
    let skips = length(node, "max_skip_count")?;
    let mode = node.string("mode", "")?;
    let counts = super::lengths("ngram_counts", &node.ints("ngram_counts")?.unwrap_or_default())?;
    let columns = super::lengths("ngram_indexes", &node.ints("ngram_indexes")?.unwrap_or_default())?;
    let weights = node.floats("weights")?;
    let pool = match (node.strings("pool_strings")?, node.ints("pool_int64s")?) {
        (Some(texts), None) => texts.iter().map(|t| node.texts().number(t)).collect(),
        (None, Some(ints)) => ints,
        _ => return Err(OpError::attribute("one pool is needed, of integers or of texts").into()),
    };
    let tokens = match x.dtype() {
        DType::Str => x.as_slice::<i64>().map_err(OpError::from)?.to_vec(),
        _ => x.to_i64().ok_or_else(|| OpError::dtype(format!("takes integers or texts, got {}", x.ty())))?,
    };
    let grams = Grams::of(&pool, &counts)?;
    if grams.0.len() != columns.len() || weights.as_ref().is_some_and(|w| w.len() != columns.len()) {
        return Err(
            OpError::attribute(format!("{} n-grams for {} places", grams.0.len(), columns.len())).into()
        );
    }
    let width = columns.iter().max().map_or(0, |&c| c.saturating_add(1));
    let (rows, row) = match *x.shape().dims() {
        [] => (1, 1),
        [n] => (1, n),
        [b, n] => (b, n),
        _ => return Err(OpError::shape(format!("takes rows of tokens, got {}", x.ty())).into()),
    };
    let shape = Shape::new(if x.shape().rank() == 2 { vec![rows, width] } else { vec![width] })?;
    node.take_bytes(shape.elements().saturating_mul(4))?;
    let work = (rows as u64).saturating_mul(row as u64).saturating_mul(skips as u64 + 1);
    if work.saturating_mul(longest as u64) > crate::limits::MAX_FOLDED_MACS {
        return Err(OpError::too_large(format!("{rows} rows of {row} tokens, {skips} skips")).into());
    }
    let mut found = vec![0f32; rows * width];
    for b in 0..rows {
        let tokens = &tokens[b * row..][..row];
        let mut count = |gram: &[i64]| {
            if let Ok(at) = grams.0.binary_search_by(|(known, _)| known.as_slice().cmp(gram)) {
                found[b * width + columns[grams.0[at].1]] += 1.0;
            }
        };
        for n in shortest..=longest {
            // A single token is the same at all distances.
            for distance in 1..=if n == 1 { 1 } else { skips + 1 } {
                let span = (n.max(1) - 1).saturating_mul(distance);
                for start in 0..row.saturating_sub(span) {
                    let gram: Vec<i64> = (0..n).map(|i| tokens[start + i * distance]).collect();
                    count(&gram);
                }
            }
        }
    }
    let weight = |column: usize| {
        let at = columns.iter().position(|&c| c == column);
        weights.as_ref().zip(at).and_then(|(w, at)| w.get(at).copied()).unwrap_or(1.0)
    };
    let factors: Vec<f32> = (0..width).map(weight).collect();
    for (i, value) in found.iter_mut().enumerate() {
        let factor = factors[i % width];
        *value = match mode {
            "TF" => *value,
            "IDF" => {
                if *value > 0.0 {
                    factor
                } else {
                    0.0
                }
            }
            "TFIDF" => *value * factor,
            other => return Err(NodeError::attribute("mode", format!("is {other:?}"))),
        };
    }
    numbers(node, "frequencies", shape, found)
}

/// The n-grams of a pool in order, each with its place in it.
struct Grams(Vec<(Vec<i64>, usize)>);

impl Grams {
    /// `counts` are where those of 1, 2, 3… tokens begin.
    fn of(pool: &[i64], counts: &[usize]) -> Result<Grams> {
        let mut grams = Vec::new();
        for (i, &start) in counts.iter().enumerate() {
            let end = counts.get(i + 1).copied().unwrap_or(pool.len());
            let part = pool.get(start..end).filter(|p| p.len().is_multiple_of(i + 1));
            let part =
                part.ok_or_else(|| NodeError::attribute("ngram_counts", "does not divide the pool"))?;
            grams.extend(part.chunks(i + 1).map(<[i64]>::to_vec));
        }
        let mut grams: Vec<(Vec<i64>, usize)> =
            grams.into_iter().enumerate().map(|(at, g)| (g, at)).collect();
        grams.sort();
        Ok(Grams(grams))
    }
}
