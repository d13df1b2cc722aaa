//! What the first run in a new shape costs.
//!
//! `cargo bench -p qcc-runtime --bench shapes -- MODEL.onnx|MODEL.qcc SYMBOL FROM TO [PRECISION]` runs a model with the
//! symbolic dimension of this name going from one length to another, as sequences grow (other symbols are 1, inputs zeros),
//! and prints the time of making each specialisation, of its first run, and of the best of those that follow.

#![allow(clippy::print_stdout, reason = "a program whose results are what it prints")]

use qcc_runtime::{
    Compiler, DynamicModel, Precision, ProgramFile,
    ir::{Tensor, onnx::Bindings},
    is_program,
};
use std::{error::Error, path::Path, time::Instant};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [path, symbol, from, to, rest @ ..] = &arguments[..] else {
        // As part of all benchmarks there is no model.
        println!("shapes: no model given");
        return Ok(());
    };
    let precision = Precision::ALL.into_iter().find(|p| rest.first().is_some_and(|name| name == p.name()));
    let compiler = Compiler::new().precision(precision.unwrap_or(Precision::Float));
    let path = Path::new(path);
    let model: DynamicModel = match is_program(path) {
        false => compiler.dynamic_file(path)?,
        true => match ProgramFile::load(path, compiler.memory_limit())? {
            ProgramFile::Dynamic(program) => program.model_with(&compiler, path.display().to_string()),
            ProgramFile::Placed(_) => return Err("its shapes are bound".into()),
        },
    };
    println!("{symbol:>12}  compile ms  first run ms  run ms");
    for length in from.parse::<usize>()?..=to.parse()? {
        let mut bindings = Bindings::default();
        bindings.symbols.insert(symbol.clone(), length);
        let types = model.model().input_types(&bindings)?;
        let inputs: Vec<Tensor> = types.iter().map(|ty| Tensor::zeros(ty.dtype, ty.shape.clone())).collect();
        let ms = |start: Instant| start.elapsed().as_secs_f64() * 1e3;
        let start = Instant::now();
        let first = model.run(&inputs)?;
        let all = ms(start);
        let compile = first.compile_time.as_secs_f64() * 1e3;
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let start = Instant::now();
            model.run(&inputs)?;
            best = best.min(ms(start));
        }
        println!("{length:>12}  {compile:>10.2}  {:>12.2}  {best:>6.2}", all - compile);
    }
    Ok(())
}
