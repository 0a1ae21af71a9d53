//! `outport-plugin-build FOLDER -o FILE.wasm`: makes a component of a plugin
//! crate, exactly as the bundled plugins are made.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::{env, fs};

mod component;
mod foreign;
mod toolchain;

const USAGE: &str = "usage: outport-plugin-build FOLDER -o FILE.wasm [--target-dir DIR]
       outport-plugin-build MODULE.wasm --world WORLD -o FILE.wasm

Compiles the plugin crate in FOLDER for wasm32-unknown-unknown and writes it as
a component. DIR keeps what the compiler makes, for the next time.

With --world it makes a component of a core module of another language, which
exports the functions of that world of wit/.";

fn main() -> Result<()> {
    let Some(args) = Args::parse(env::args().skip(1))? else {
        println!("{USAGE}");
        return Ok(());
    };
    let mut plugins = match &args.world {
        Some(world) => vec![foreign::build(&args.folder, world)?],
        None => component::build(&args.folder, &args.target_dir)?,
    };
    let (Some(plugin), true) = (plugins.pop(), plugins.is_empty()) else {
        bail!(
            "{} does not make exactly one component (more: {:?}): a plugin is one crate with \
             crate-type = [\"cdylib\"]",
            args.folder.display(),
            plugins.iter().map(|other| &other.name).collect::<Vec<_>>()
        );
    };
    fs::write(&args.output, &plugin.component)
        .with_context(|| format!("Cannot write {}", args.output.display()))?;
    let contract = component::contract_version(&plugin.component)?;
    let kind = component::kind(&plugin.component)?;
    println!(
        "{} of {}: {kind}, {} KiB, contract outport:plugin@{contract}",
        args.output.display(),
        plugin.folder.display(),
        plugin.component.len().div_ceil(1024)
    );
    Ok(())
}

struct Args {
    /// Or the module.
    folder: PathBuf,
    output: PathBuf,
    target_dir: PathBuf,
    world: Option<String>,
}

impl Args {
    /// `None`: help was asked for.
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Self>> {
        let (mut folder, mut output, mut target_dir, mut world) = (None, None, None, None);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "-h" | "--help" => return Ok(None),
                "-o" => output = Some(args.next().context("-o needs a file")?),
                "--world" => world = Some(args.next().context("--world needs a name")?),
                "--target-dir" => {
                    target_dir = Some(args.next().context("--target-dir needs a folder")?);
                }
                _ if arg.starts_with('-') || folder.is_some() => bail!("{arg}?\n{USAGE}"),
                _ => folder = Some(arg),
            }
        }
        let target_dir = match target_dir {
            Some(dir) => PathBuf::from(dir),
            None => Path::new(env!("OUTPORT_PLUGIN_TARGET_DIR")).to_owned(),
        };
        Ok(Some(Self {
            folder: folder.context(USAGE)?.into(),
            output: output.context(USAGE)?.into(),
            // The compiler runs in FOLDER.
            target_dir: env::current_dir()?.join(target_dir),
            world,
        }))
    }
}
