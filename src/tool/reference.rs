//! `mica completions` and `mica man`: what can be made from the definitions of the commands.

use clap::CommandFactory as _;
use serde_json::json;

use super::{Error, Report};
use crate::config::cli::{Cli, Completions, Man, Shell};
use crate::sys::files;

pub(super) fn completions(arguments: &Completions) -> Report {
    let (shell, name) = match arguments.shell {
        Shell::Bash => (clap_complete::Shell::Bash, "bash"),
        Shell::Zsh => (clap_complete::Shell::Zsh, "zsh"),
        Shell::Fish => (clap_complete::Shell::Fish, "fish"),
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "mica", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    let json = json!({ "shell": name, "script": script });
    Report::new(script, json)
}

pub(super) fn man(arguments: &Man) -> Result<Report, Error> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    render(&command, "mica", &mut pages)?;
    files::make_folder(&arguments.out)?;
    for (name, page) in &pages {
        files::write_public(&arguments.out.join(name), page, arguments.force)?;
    }
    let names: Vec<_> = pages.iter().map(|(name, _)| name).collect();
    let text = format!("wrote {} pages to {}\n", pages.len(), arguments.out.display());
    Ok(Report::new(text, json!({ "folder": arguments.out, "pages": names })))
}

fn render(command: &clap::Command, name: &str, pages: &mut Vec<(String, Vec<u8>)>) -> Result<(), Error> {
    let mut page = Vec::new();
    // A page is called as it is asked for: man mica-root-new.
    clap_mangen::Man::new(command.clone())
        .title(name)
        .render(&mut page)
        .map_err(|e| Error::Usage(e.to_string()))?;
    pages.push((format!("{name}.1"), page));
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        render(sub, &format!("{name}-{}", sub.get_name()), pages)?;
    }
    Ok(())
}
