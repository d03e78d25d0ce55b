//! The `mica` program.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::ffi::OsString;
use std::io::{ErrorKind, Write as _};
use std::panic::{PanicHookInfo, catch_unwind};
use std::path::Path;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind as ClapError};
use clap::{CommandFactory as _, Parser as _};

use mica::app::{agent, serve};
use mica::config::cli::{Cli, Command, Output};
use mica::config::{istio_ca, serve as config};
use mica::core::inspect::one_line;
use mica::telemetry;
use mica::tool::{self, Report};

/// The answer is no.
const NO: u8 = 1;
/// Wrong usage or bad input.
const BAD_INPUT: u8 = 2;
/// A fault of Mica's.
const OUR_FAULT: u8 = 70;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(tell_panic));
    let code = catch_unwind(run).unwrap_or(ExitCode::from(OUR_FAULT));
    telemetry::flush();
    code
}

fn run() -> ExitCode {
    let cli = match Cli::try_parse_from(typed()) {
        Ok(cli) => cli,
        Err(refused) => return usage(&refused),
    };
    let output = cli.output;
    match cli.command {
        Command::Serve(arguments) => run_serve(*arguments, output),
        Command::Agent(arguments) => ended(agent::run(*arguments)),
        Command::IstioCa(arguments) => match (arguments.command, arguments.serve()) {
            (Some(istio_ca::Command::Version), _) => {
                write(&Cli::command().render_version()).unwrap_or(ExitCode::SUCCESS)
            }
            (None, Ok(arguments)) => run_serve(arguments, output),
            (None, Err(refused)) => usage(&refused),
        },
        command => match tool::run(command) {
            Some(Ok(report)) => tell(&report, output),
            Some(Err(fault)) => {
                let code = match (fault.is_ours(), fault.is_no()) {
                    (true, _) => OUR_FAULT,
                    (false, true) => NO,
                    (false, false) => BAD_INPUT,
                };
                failed(&fault.to_string(), code)
            }
            None => failed("this command has no part in this program", OUR_FAULT),
        },
    }
}

fn run_serve(arguments: config::Args, output: Output) -> ExitCode {
    ended(serve::run(arguments, output))
}

fn ended(how: Result<(), serve::Error>) -> ExitCode {
    match how {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault @ serve::Error::Usage(_)) => failed(&fault.to_string(), BAD_INPUT),
        Err(fault @ serve::Error::Fault(_)) => failed(&fault.to_string(), OUR_FAULT),
    }
}

/// What was typed; the manifests of istio-ca call the program by its name.
fn typed() -> Vec<OsString> {
    let mut words: Vec<OsString> = std::env::args_os().collect();
    if words.first().is_some_and(|called| Path::new(called).file_name() == Some("istio_ca".as_ref())) {
        words.splice(..1, ["mica".into(), "istio-ca".into()]);
    }
    words
}

fn tell(report: &Report, output: Output) -> ExitCode {
    let written = match output {
        Output::Text => write(&report.text),
        Output::Json => write(&format!("{:#}\n", report.json)),
    };
    for note in &report.notes {
        error_line(&format!("note: {note}"));
    }
    if let Some(denial) = &report.denial {
        error_line(denial);
    }
    match written {
        Some(code) => code,
        None if report.good => ExitCode::SUCCESS,
        None => ExitCode::from(NO),
    }
}

/// A reader that has gone away (`mica inspect … | head -1`) is no fault, and changes no verdict.
fn write(text: &str) -> Option<ExitCode> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(fault) if fault.kind() != ErrorKind::BrokenPipe => {
            Some(failed(&format!("cannot write to standard output: {fault}"), BAD_INPUT))
        }
        _ => None,
    }
}

fn failed(fault: &str, code: u8) -> ExitCode {
    error_line(fault);
    ExitCode::from(code)
}

/// One line, whatever is in it.
fn error_line(text: &str) {
    // There is nowhere left to say that this failed.
    let _ = writeln!(std::io::stderr().lock(), "mica: {}", one_line(text));
}

/// Help and version are answers; everything else that clap says becomes one line.
fn usage(refused: &clap::Error) -> ExitCode {
    let mut rendered = refused.render().to_string();
    match refused.kind() {
        ClapError::DisplayHelp | ClapError::DisplayVersion => {
            return write(&rendered).unwrap_or(ExitCode::SUCCESS);
        }
        ClapError::MissingSubcommand | ClapError::DisplayHelpOnMissingArgumentOrSubcommand => {
            let command = command_typed();
            let hint = if command == "mica" { "; begin with `mica serve examples/bookinfo`" } else { "" };
            return failed(&format!("a command is missing{hint}, or see `{command} --help`"), BAD_INPUT);
        }
        _ => {}
    }
    let command = command_typed();
    for kind in [ContextKind::InvalidValue, ContextKind::InvalidArg, ContextKind::InvalidSubcommand] {
        if let Some(ContextValue::String(value)) = refused.get(kind) {
            rendered = rendered.replace(value, &shortened(value));
        }
    }
    let mut said = Vec::new();
    for line in rendered.lines().map(str::trim) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        let line = line.strip_prefix("error: ").or_else(|| line.strip_prefix("tip: ")).unwrap_or(line);
        match line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            Some(values) => said.push(values.to_owned()),
            None if line.is_empty() => {}
            None => said.push(line.to_owned()),
        }
    }
    // "the following required arguments were not provided:" is followed by what it speaks of.
    let mut line = String::new();
    for part in said {
        if !line.is_empty() {
            line.push_str(if line.ends_with(':') { " " } else { "; " });
        }
        line.push_str(&part);
    }
    failed(&format!("{line}; see `{command} --help`"), BAD_INPUT)
}

/// What was typed, in a line of bounded length.
fn shortened(value: &str) -> String {
    const SHOWN: usize = 96;
    let line = one_line(value);
    match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// The command that was meant, as far as it was typed: `mica root new`. clap does not always say.
fn command_typed() -> String {
    let mut command = Cli::command();
    let mut path = vec!["mica".to_owned()];
    for word in typed().into_iter().skip(1) {
        let word = word.to_string_lossy();
        match command.find_subcommand(&*word).cloned() {
            Some(sub) => {
                command = sub;
                path.push(word.into_owned());
            }
            None if word.starts_with('-') => {}
            None => break,
        }
    }
    path.join(" ")
}

fn tell_panic(panic: &PanicHookInfo<'_>) {
    let what = panic.payload_as_str().unwrap_or("no message");
    let place = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
    error_line(&format!(
        "this is a fault of mica's own ({what}, at {place}, version {}); please report it with this line and what you did",
        env!("CARGO_PKG_VERSION")
    ));
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        let _ = writeln!(std::io::stderr().lock(), "{backtrace}");
    }
}
