//! Runs graphs by the definition of their ops.
