//! Elementary functions as explicit sequences of f32 operations.
