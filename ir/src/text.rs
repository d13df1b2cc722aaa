//! The text form.
use crate::Graph;
/// Prints.
pub fn print(_g: &Graph) -> String {
    String::new()
}
