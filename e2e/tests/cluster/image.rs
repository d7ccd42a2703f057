//! The image as it is pushed: its size, and where its debug information is. That it runs is every other test's to show.

use kvasir_e2e::command::run;
use std::fs;
use std::process::Command;

/// What a node has to pull before the first replica starts.
const MAX_BYTES: u64 = 40_000_000;

#[test]
fn the_image_is_small_and_its_debug_information_is_beside_its_programs() {
    let image = crate::image();
    let archive = std::env::temp_dir().join(format!("kvasir-image-{}.tar", std::process::id()));
    image.write(&archive).expect("written");
    let n_bytes = fs::metadata(&archive).expect("its size").len();
    fs::remove_file(&archive).expect("removed");
    assert!(n_bytes < MAX_BYTES, "{n_bytes} bytes");

    for name in ["kvasir-server", "kvasir-operator"] {
        let file = image
            .files
            .iter()
            .find(|file| file.path == format!("/{name}"));
        let program = &file.expect("the program").from;
        let sections =
            |path| run(Command::new("readelf").args(["-SW"]).arg(path)).expect("an ELF file");
        let own = sections(program);
        assert!(
            !own.contains(".debug_line") && own.contains(".gnu_debuglink"),
            "{name}: {own}"
        );
        assert!(
            own.contains(".symtab"),
            "{name}: a backtrace names functions: {own}"
        );
        let debug = program.with_file_name(format!("{name}.debug"));
        assert!(sections(&debug).contains(".debug_line"), "{name}");
    }
}
