"""The tools that people measure and judge servers with, run themselves against a server that is up: guidellm, lm-eval and,
where it is installed, vLLM's `bench serve`. No request may fail.

    cargo run --release --bin kvasir-server
    python3 e2e/benchmarks/tools/run.py [http://127.0.0.1:8000] [--tools guidellm lm-eval] [--vllm PROGRAM]

guidellm and lm-eval are installed once, at the versions in guidellm.txt and lm-eval.txt (130 and 165 MB to download), below
${KVASIR_CACHE:-~/.cache/kvasir}. vLLM needs torch and CUDA's libraries (4 GB): name the `vllm` program of an environment
that has it. `--tokenizer` is the served model's directory; the demo's is the default.
"""

import argparse
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import venv

HERE = pathlib.Path(__file__).resolve().parent
CACHE = pathlib.Path(os.environ.get("KVASIR_CACHE") or pathlib.Path.home() / ".cache/kvasir")
N_REQUESTS = 24


def environment(tool):
    """The folder of the tool's own Python environment, made once, however many ask for it."""
    requirements = HERE / f"{tool}.txt"
    place = CACHE / f"tool-{tool}-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / ".finished").exists():
            print(f"installing {tool} (once; kept in {place})", flush=True)
            shutil.rmtree(place, ignore_errors=True)
            venv.create(place, with_pip=True)
            pip = [place / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "-r", requirements], check=True)
            (place / ".finished").touch()
    return place


def run(command, log, **variables):
    """Runs a tool with all that it prints in a file; the end of that where it fails."""
    with open(log, "wb") as out:
        variables = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", **variables}
        done = subprocess.run([str(part) for part in command], stdout=out, stderr=out, env={**os.environ, **variables})
    if done.returncode != 0:
        sys.exit(f"{command[0]} ended with {done.returncode}:\n{log.read_text()[-3000:]}")


def expect(what, found, wanted):
    print(f"{what}: {found}", flush=True)
    if found != wanted:
        sys.exit(f"{what}: {found}, expected {wanted}")


def guidellm(server, folder):
    program = environment("guidellm") / "bin/guidellm"
    for route in ("text_completions", "chat_completions"):
        report = folder / f"{route}.json"
        run([program, "benchmark", "--target", server.url, "--model", server.model, "--processor", server.tokenizer,
             "--data", '{"prompt_tokens": 64, "output_tokens": 32}', "--rate-type", "concurrent", "--rate", 4,
             "--max-requests", N_REQUESTS, "--output-path", report, "--disable-progress"],
            folder / f"{route}.log", GUIDELLM__PREFERRED_ROUTE=route)  # fmt: skip
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
        totals = benchmark["request_totals"]
        expect(f"guidellm {route}", totals, {"successful": N_REQUESTS, "errored": 0, "incomplete": 0, "total": N_REQUESTS})
        tokens = {request["output_tokens"] for request in benchmark["requests"]["successful"]}
        expect(f"guidellm {route}, output tokens", tokens, {32})


def lm_eval(server, folder):
    program = environment("lm-eval") / "bin/lm_eval"
    n_questions = len((HERE / "questions.jsonl").read_text().splitlines())
    for kind, path, tasks, flags in [
        ("local-completions", "completions", ["kvasir_choice", "kvasir_generate"], []),
        ("local-chat-completions", "chat/completions", ["kvasir_generate"], ["--apply_chat_template"]),
    ]:
        options = {"model": server.model, "base_url": f"{server.url}/v1/{path}", "tokenizer": server.tokenizer,
                   "num_concurrent": 4, "max_retries": 1}  # fmt: skip
        out = folder / kind
        run([program, "--model", kind, "--model_args", ",".join(f"{name}={value}" for name, value in options.items()),
             "--tasks", ",".join(tasks), "--include_path", tasks_folder(folder), "--log_samples", "--output_path", out, *flags],
            folder / f"{kind}.log")  # fmt: skip
        for task in tasks:
            (samples,) = out.glob(f"**/samples_{task}_*.jsonl")
            samples = [json.loads(line) for line in samples.read_text().splitlines()]
            whole = [sample for sample in samples if all(answer[0] not in ("", None) for answer in sample["resps"])]
            expect(f"lm-eval {kind} {task}, answers", len(whole), n_questions)
            if task == "kvasir_choice" and server.model == "kvasir-demo":
                expect(f"lm-eval {kind} {task}, right ones", sum(sample["acc"] for sample in samples), n_questions)


def tasks_folder(folder):
    """The tasks, which have to name their questions by where they are."""
    tasks = folder / "tasks"
    if not tasks.exists():
        tasks.mkdir()
        for task in HERE.glob("*.yaml"):
            files = json.dumps({"data_files": str(HERE / "questions.jsonl")})
            (tasks / task.name).write_text(f"{task.read_text()}dataset_kwargs: {files}\n")
    return tasks


def vllm(server, folder, program):
    for backend, path in [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]:
        run([program, "bench", "serve", "--backend", backend, "--base-url", server.url, "--endpoint", path, "--model", server.model,
             "--tokenizer", server.tokenizer, "--dataset-name", "random", "--random-input-len", 64, "--random-output-len", 32,
             "--ignore-eos", "--num-prompts", N_REQUESTS, "--max-concurrency", 4, "--save-result", "--result-dir", folder,
             "--result-filename", f"{backend}.json"], folder / f"{backend}.log")  # fmt: skip
        found = json.loads((folder / f"{backend}.json").read_text())
        expect(f"vllm bench serve {backend}, completed", found["completed"], N_REQUESTS)
        expect(f"vllm bench serve {backend}, output tokens", found["total_output_tokens"], 32 * N_REQUESTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--tools", nargs="+", choices=["guidellm", "lm-eval"], default=["guidellm", "lm-eval"])
    parser.add_argument("--tokenizer", type=pathlib.Path, default=HERE.parents[2] / "server/demo-model")
    parser.add_argument("--vllm", help="the program of an environment that has it")
    server = parser.parse_args()
    server.url = server.url.rstrip("/")
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=10) as answer:
        server.model = json.load(answer)["data"][0]["id"]
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kvasir-tools-"))
    print(f"{server.model} at {server.url}; logs in {folder}", flush=True)
    for tool, check in (("guidellm", guidellm), ("lm-eval", lm_eval)):
        if tool in server.tools:
            check(server, folder)
    if server.vllm:
        vllm(server, folder, server.vllm)
    else:
        print("vllm bench serve: not run; --vllm names the program of an environment that has it", flush=True)


if __name__ == "__main__":
    main()
