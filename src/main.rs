//! The `mica` program.
use clap::Parser as _;
#[derive(clap::Parser)]
enum Cli {
    Serve(mica::config::serve::Args),
}
fn main() -> std::process::ExitCode {
    let Cli::Serve(args) = Cli::parse();
    match mica::app::serve::run(args) {
        Ok(()) => 0.into(),
        Err(e) => {
            eprintln!("mica: {e}");
            2.into()
        }
    }
}
