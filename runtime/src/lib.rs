pub mod zoo;
