//! Where the time from a file to a session that is ready goes.

use crate::Model;
use serde::Serialize;
use std::time::Duration;

/// A part of loading a model.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct LoadPhase {
    /// What is done.
    pub name: &'static str,
    /// How long it took, in milliseconds.
    pub ms: f64,
    /// Whether it goes on beside the others, and its time is summed over threads. The others follow each other.
    pub meanwhile: bool,
}

impl Model {
    /// The phases of loading: those of reading its `.qcc` file, if it is from one, then those of generating its code.
    pub fn load_phases(&self) -> Vec<LoadPhase> {
        let phase = |meanwhile: bool| {
            move |(name, time): (&'static str, Duration)| LoadPhase {
                name,
                ms: time.as_secs_f64() * 1e3,
                meanwhile,
            }
        };
        let code = self.compile_times();
        let file = self.file_times().map(|t| {
            [
                ("map the file and check it", t.check),
                ("make its graph", t.graph),
                ("verify the graph", t.verify),
            ]
        });
        let following = [
            ("constants of products", code.constants),
            ("lowering", code.lowering),
            ("waiting for packing and code", code.waiting),
            ("placing the code", code.sealing),
        ];
        let beside = [("packing weights", code.packing), ("making code", code.generating)];
        let following = file.into_iter().flatten().chain(following).map(phase(false));
        following.chain(beside.into_iter().map(phase(true))).collect()
    }
}
