//! Other programs: started, or told by a signal.

use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

pub use rustix::process::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use tokio::process::Command;
use tokio::time::timeout;

use super::{files, reason};

/// A program that runs longer is ended.
const LONGEST: Duration = Duration::from_secs(60);

/// Runs a program to its end, without a shell. What it writes goes to standard error.
pub async fn run(program: &OsString, arguments: &[OsString]) -> Result<(), String> {
    let shown = Path::new(program).display();
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .kill_on_drop(true)
        .spawn()
        .map_err(|fault| format!("cannot run {shown}: {}", reason(&fault)))?;
    let ended = timeout(LONGEST, child.wait())
        .await
        .map_err(|_| format!("{shown} was ended: it ran longer than {} s", LONGEST.as_secs()))?
        .map_err(|fault| format!("cannot wait for {shown}: {}", reason(&fault)))?;
    match ended.success() {
        true => Ok(()),
        false => Err(format!("{shown} failed: {ended}")),
    }
}

/// Sends a signal to the process whose number a file holds.
pub fn signal(pid_file: &Path, signal: Signal) -> Result<(), String> {
    let shown = pid_file.display();
    let text = files::read(pid_file, 64).map_err(|fault| fault.to_string())?;
    let number = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
    let pid = number.filter(|number| *number > 1).and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| format!("{shown} holds no process number"))?;
    let told = pidfd_open(pid, PidfdFlags::empty()).and_then(|handle| pidfd_send_signal(handle, signal));
    told.map_err(|fault| {
        format!("cannot signal process {} of {shown}: {}", pid.as_raw_nonzero(), reason(&fault.into()))
    })
}

/// A signal by its name, with or without SIG.
pub fn signal_named(name: &str) -> Option<Signal> {
    let name = name.to_ascii_uppercase();
    Some(match name.strip_prefix("SIG").unwrap_or(&name) {
        "HUP" => Signal::HUP,
        "INT" => Signal::INT,
        "TERM" => Signal::TERM,
        "USR1" => Signal::USR1,
        "USR2" => Signal::USR2,
        "WINCH" => Signal::WINCH,
        _ => return None,
    })
}
