//! Help and output, word for word.

#[test]
fn help_and_output_are_as_written_down() {
    trycmd::TestCases::new()
        .env("COLUMNS", "100")
        .default_bin_path(env!("CARGO_BIN_EXE_mica"))
        .register_bin("mica", std::path::PathBuf::from(env!("CARGO_BIN_EXE_mica")))
        .case("tests/cli/*.trycmd");
}
