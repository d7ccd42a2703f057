//! What command lines mean, and what is said of those that mean nothing.

use super::*;

fn parse(flags: &[&str]) -> Result<Args, Vec<String>> {
    match Args::parse_from(std::iter::once("kvasir-server").chain(flags.iter().copied())) {
        Ok(args) => Ok(args),
        Err(ArgsError::Mistakes(mistakes)) => Err(mistakes),
        Err(ArgsError::Usage(e)) => panic!("{e}"),
    }
}

#[test]
fn the_defaults_serve_the_demo_model() {
    let args = parse(&[]).unwrap();
    assert_eq!(args.model.source, ModelSource::Demo);
    assert_eq!(args.model.served_name(), "kvasir-demo");
    let PortArgs {
        host,
        port,
        management_port,
    } = args.ports;
    assert_eq!((host.to_string().as_str(), port), ("127.0.0.1", 8000));
    assert_eq!(management_port, None);
}

#[test]
fn prefixes_are_cached_unless_the_last_word_is_no() {
    let (yes, no) = ("--enable-prefix-caching", "--no-enable-prefix-caching");
    for (flags, want) in [
        (&[] as &[&str], true),
        (&[yes], true),
        (&[no], false),
        (&[yes, no], false),
        (&[no, yes], true),
    ] {
        assert_eq!(
            parse(flags).unwrap().engine.prefix_caching(),
            want,
            "{flags:?}"
        );
    }
}

#[test]
fn streams_may_be_stretched_by_what_is_told() {
    let stretch = |flags: &[&str]| {
        let args = parse(flags)?;
        Ok::<_, Vec<String>>(args.engine.max_decode_stretch.bound())
    };
    let flag = "--max-decode-stretch";
    assert_eq!(stretch(&[]), Ok(Some(crate::engine::pacer::DECODE_STRETCH)));
    assert_eq!(stretch(&[flag, "5.5"]), Ok(Some(5.5)));
    assert_eq!(stretch(&[flag, "0"]), Ok(None));
    for wrong in ["1", "-1", "NaN", "1e9"] {
        let flag = format!("{flag}={wrong}");
        let mistake =
            format!("--max-decode-stretch: {wrong:?} is not 0 or a number from 1.1 to 1000");
        assert_eq!(stretch(&[&flag]), Err(vec![mistake]));
    }
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let mut mistakes = parse(&[
        "--port",
        "x",
        "--dtype",
        "int4",
        "--model",
        "/no/such",
        "--gpu-memory-utilization",
        "0",
        "--device",
        "tpu",
        "--read-timeout-seconds=-1",
        "--block-size",
        "4096",
        "--threads",
        "0",
    ])
    .unwrap_err();
    mistakes.sort();
    assert_eq!(
        mistakes,
        [
            "--block-size: \"4096\" is not a number from 1 to 1024",
            "--device: \"tpu\" is not one of auto, cpu, cuda",
            "--dtype: \"int4\" is not one of auto, bfloat16, float32",
            "--gpu-memory-utilization: \"0\" is not a number above 0, at most 1",
            "--model: \"/no/such\" is not \"demo\", an existing directory, or hf://OWNER/NAME",
            "--port: \"x\" is not a number from 0 to 65535",
            "--read-timeout-seconds: \"-1\" is not a number of seconds from 0 to 86400",
            "--threads: \"0\" is not a number above 0",
        ]
    );
}

#[test]
fn contradictions_are_sentences() {
    for (flags, want) in [
        (
            ["--max-num-batched-tokens", "8", "--max-num-seqs", "64"],
            "--max-num-batched-tokens: 8 is less than --max-num-seqs, 64; a step needs one token for each request",
        ),
        (
            ["--management-port", "8000", "--port", "8000"],
            "--management-port: 8000 is --port too; choose another",
        ),
    ] {
        assert_eq!(parse(&flags).unwrap_err(), [want]);
    }
    let args = parse(&["--management-port", "0", "--port", "0"]).unwrap();
    assert_eq!(args.ports.management_port, Some(0));
}

#[test]
fn a_repository_on_a_hub_is_a_model() {
    let args = parse(&["--model", "hf://Qwen/Qwen3-8B@main"]).unwrap();
    assert_eq!(args.model.served_name(), "Qwen/Qwen3-8B");
    let mistakes = parse(&["--model", "hf://Qwen"]).unwrap_err();
    assert_eq!(
        mistakes,
        ["--model: \"hf://Qwen\" is not hf://OWNER/NAME or hf://OWNER/NAME@REVISION"]
    );
}

#[test]
fn a_plan_takes_the_servers_flags_and_the_model_alone() {
    let parse =
        |flags: &[&str]| CommandLine::parse_from(["kvasir-server"].iter().chain(flags).copied());
    let plan = parse(&[
        "plan",
        "hf://a/b",
        "--memory-gib",
        "1.5",
        "--max-model-len",
        "7",
    ]);
    let Ok(CommandLine::Plan(args)) = plan else {
        panic!("{plan:?}");
    };
    assert_eq!(args.memory_gib, Some(3 << 29));
    assert_eq!(args.server.model.max_model_len, Some(7));
    assert_eq!(args.server.model.served_name(), "a/b");
    assert!(!args.json);
    let plan = parse(&["plan", "--model", "hf://a/b", "--json"]);
    assert!(matches!(plan, Ok(CommandLine::Plan(args)) if args.json));
    assert!(matches!(
        parse(&["--model", "demo"]),
        Ok(CommandLine::Serve(_))
    ));
    let mistakes = parse(&["plan", "/no/such", "--memory-gib", "0"]);
    let Err(ArgsError::Mistakes(mistakes)) = mistakes else {
        panic!("{mistakes:?}");
    };
    assert_eq!(mistakes.len(), 2, "{mistakes:?}");
    assert!(
        mistakes
            .iter()
            .any(|it| it.starts_with("MODEL: \"/no/such\" is not"))
    );
}

#[test]
fn keys_are_never_shown() {
    let flags = ["--api-key", "red:hush-1", "hush-2", "--api-key", "hush-3"];
    let args = parse(&flags).unwrap();
    assert_eq!(args.access.api_keys.len(), 3);
    let shown = format!("{args:?}");
    assert!(shown.contains("red") && !shown.contains("hush"), "{shown}");
    let mistakes = parse(&["--api-key", "hush hush"]).unwrap_err();
    let want = format!("--api-key: what was given is not {KEY_FORM}");
    assert_eq!(mistakes, [want]);
}

#[test]
fn limits_need_keys_and_tls_both_files() {
    let mistakes = |flags: &[&str]| parse(flags).unwrap_err();
    assert_eq!(
        mistakes(&["--tokens-per-minute", "9", "--ssl-keyfile", "key.pem"]),
        [
            "--tokens-per-minute: it is a limit for each API key; give keys with --api-key-file",
            "--ssl-certfile and --ssl-keyfile: TLS needs both; give the other too",
        ]
    );
    let args = parse(&["--tokens-per-minute", "9", "--api-key", "k"]).unwrap();
    assert_eq!(args.access.tokens_per_minute, 9);
    let origins = mistakes(&["--allowed-origins", "https://a.example"]);
    assert!(
        origins[0].contains("is not a JSON list of origins"),
        "{origins:?}"
    );
}

#[test]
fn a_directory_gives_the_name() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("my-model");
    std::fs::create_dir(&model).unwrap();
    let model = model.to_str().unwrap();
    let args = parse(&["--model", model]).unwrap();
    assert_eq!(args.model.served_name(), "my-model");
    let args = parse(&["--model", model, "--served-model-name", "n"]).unwrap();
    assert_eq!(args.model.served_name(), "n");
}

#[test]
fn every_flag_has_its_environment_variable() {
    let command = command::<Args>();
    let variables: Vec<&str> = command
        .get_arguments()
        .map(|arg| arg.get_env().unwrap().to_str().unwrap())
        .collect();
    assert_eq!(variables.len(), 40);
    for variable in [
        "KVASIR_MODEL",
        "KVASIR_PORT",
        "KVASIR_MANAGEMENT_PORT",
        "KVASIR_GPU_MEMORY_UTILIZATION",
        "KVASIR_NUM_GPU_BLOCKS_OVERRIDE",
        "KVASIR_DRAIN_SECONDS",
        "KVASIR_API_KEY",
        "KVASIR_SSL_CERTFILE",
    ] {
        assert!(variables.contains(&variable), "{variable}");
    }
}
