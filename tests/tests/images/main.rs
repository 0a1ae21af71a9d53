//! More than two hundred generated qcow2 images: their content, read through the server over NBD,
//! is what `qemu-img convert` says; and after random writes, zeroes and discards through the
//! server, the content is a model's and `qemu-img check` finds no error and no leak.
//!
//! A failure names its recipe; `OUTPORT_TEST_RECIPE=17` cooks that one alone.

mod model;
mod recipe;

use std::fs;
use std::ops::Range;
use std::path::PathBuf;

use outport_tests::{
    Daemon, assert_same, check_image, checksum, checksum_file, qemu_img, requires,
};
use serde_json::json;
use tempfile::TempDir;

use model::{Model, read_all};
use recipe::{Cooked, DataFile, RECIPES, Recipe, Resize};

/// Requests sent to each image; more find more, at about 10 ms each.
const REQUESTS: usize = 60;

/// An image on its way through the test.
struct Dish {
    recipe: Recipe,
    cooked: Cooked,
    content: Vec<u8>,
    below: Vec<String>,
}

/// One daemon serves all recipes of the range at once.
fn serve(numbers: Range<u64>) {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let only = std::env::var("OUTPORT_TEST_RECIPE").ok();
    let only: Option<u64> = only.and_then(|text| text.parse().ok());
    let numbers: Vec<u64> = numbers
        .filter(|n| only.is_none_or(|only| only == *n))
        .collect();
    if numbers.is_empty() {
        return;
    }
    let folder = TempDir::new().expect("a temp folder can be made");
    let mut dishes: Vec<Dish> = numbers
        .iter()
        .map(|number| prepare(Recipe::numbered(*number), &folder))
        .collect();
    let mut daemon = Daemon::start();
    for dish in &mut dishes {
        let name = export(&mut daemon, dish);
        let client = daemon.client(&name);
        dish.content = read_and_write(dish, client);
    }
    daemon.stop();
    for dish in &dishes {
        judge(dish, &folder);
    }
}

fn prepare(recipe: Recipe, folder: &TempDir) -> Dish {
    let cooked = recipe.cook(folder.path());
    check_image(&cooked.path, &format!("{recipe}: before serving"));
    let content = convert(&cooked, folder);
    let below = cooked
        .below
        .iter()
        .map(|path| checksum_file(path))
        .collect();
    Dish {
        recipe,
        cooked,
        content,
        below,
    }
}

fn export(daemon: &mut Daemon, dish: &Dish) -> String {
    let name = format!("image{}", dish.recipe.number);
    let mut node = dish.cooked.blockdev.clone();
    node["node-name"] = json!(name);
    if let Err(error) = daemon.qmp.execute("blockdev-add", node) {
        panic!("{}: blockdev-add: {error}", dish.recipe);
    }
    daemon.add_export(&name, true);
    name
}

/// First everything reads as qemu-img read it; then random requests; the model's last word.
fn read_and_write(dish: &Dish, mut client: outport_tests::nbd::Client) -> Vec<u8> {
    let name = dish.recipe.to_string();
    let read = read_all(&mut client, &name);
    assert_same(&read, &dish.content, &format!("{name}: over NBD, as made"));
    assert_eq!(checksum(&read), checksum(&dish.content), "{name}");
    let mut model = Model::new(client, read, dish.recipe.number, name);
    model.exercise(REQUESTS);
    model.verify();
    model.finish()
}

/// After a clean stop: no error, no leak, the model's content, and nothing below was touched.
fn judge(dish: &Dish, folder: &TempDir) {
    let name = dish.recipe.to_string();
    check_image(&dish.cooked.path, &format!("{name}: after a clean stop"));
    let content = convert(&dish.cooked, folder);
    assert_same(
        &content,
        &dish.content,
        &format!("{name}: by qemu-img, after a clean stop"),
    );
    for (path, before) in dish.cooked.below.iter().zip(&dish.below) {
        assert_eq!(
            checksum_file(path),
            *before,
            "{name}: {} was written",
            path.display()
        );
    }
}

fn convert(cooked: &Cooked, folder: &TempDir) -> Vec<u8> {
    let raw: PathBuf = folder.path().join("converted.raw");
    let text = |path: &PathBuf| path.to_str().expect("temp paths are UTF-8").to_owned();
    let args = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        &text(&cooked.path),
        &text(&raw),
    ];
    qemu_img(&args);
    let content = fs::read(&raw).expect("qemu-img has just written it");
    fs::remove_file(&raw).expect("it is ours");
    content
}

/// Tests of 26 recipes each: they run beside each other, on a daemon each.
macro_rules! batches {
    ($($name:ident: $numbers:expr;)*) => { $(#[test] fn $name() { serve($numbers); })* };
}

batches! {
    images_000_to_025: 0..26;
    images_026_to_051: 26..52;
    images_052_to_077: 52..78;
    images_078_to_103: 78..104;
    images_104_to_129: 104..130;
    images_130_to_155: 130..156;
    images_156_to_181: 156..182;
    images_182_to_207: 182..208;
}

#[test]
fn recipes_cover_every_option() {
    let recipes: Vec<Recipe> = (0..RECIPES).map(Recipe::numbered).collect();
    let layers: Vec<_> = recipes.iter().flat_map(|recipe| &recipe.layers).collect();
    let covered = |what: &str, count: usize| assert!(count >= 3, "{what}: only {count} recipes");
    for bits in 9..=21 {
        let count = layers
            .iter()
            .filter(|layer| layer.cluster_size == 1 << bits)
            .count();
        covered(&format!("clusters of 2^{bits}"), count);
    }
    for bits in 0..=6 {
        let count = layers
            .iter()
            .filter(|layer| layer.refcount_bits == 1 << bits)
            .count();
        covered(&format!("refcounts of 2^{bits} bits"), count);
    }
    for mode in ["off", "metadata", "falloc", "full"] {
        covered(
            mode,
            layers
                .iter()
                .filter(|layer| layer.preallocation == mode)
                .count(),
        );
    }
    for kind in ["zlib", "zstd"] {
        covered(
            kind,
            layers
                .iter()
                .filter(|layer| layer.compression == Some(kind))
                .count(),
        );
    }
    for kind in [DataFile::External, DataFile::ExternalRaw] {
        let count = layers
            .iter()
            .filter(|layer| layer.data_file == kind)
            .count();
        covered(&format!("{kind:?}"), count);
    }
    for way in [Resize::Grow, Resize::Shrink] {
        let count = recipes.iter().filter(|recipe| recipe.resize == way).count();
        covered(&format!("{way:?}"), count);
    }
    covered(
        "compat 0.10",
        layers.iter().filter(|layer| layer.compat == "0.10").count(),
    );
    covered(
        "extended_l2",
        layers.iter().filter(|layer| layer.extended_l2).count(),
    );
    covered(
        "lazy_refcounts",
        layers.iter().filter(|layer| layer.lazy_refcounts).count(),
    );
    covered(
        "snapshots",
        recipes
            .iter()
            .filter(|recipe| recipe.snapshots == 2)
            .count(),
    );
    covered(
        "three deep",
        recipes
            .iter()
            .filter(|recipe| recipe.layers.len() == 3)
            .count(),
    );
}
