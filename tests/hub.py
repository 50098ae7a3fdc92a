"""A hub on the loopback address: the three requests huggingface_hub makes, answered from a folder."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

import tiny

COMMIT, NEWER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def publish(folder: Path, shard: str = "1GB") -> None:
    """A small checkpoint in the published state: flat config, three tokens in tokenizer.json and the others in
    tokenizer_config.json, the chat template in a file of its own; and files that are not to be fetched."""
    model = tiny.write(folder, layout="flat", shard=shard)
    tiny.published_tokenizer(folder)
    template = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ends = [model.config.text_config.eos_token_id]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.01, "top_k": 1}))
    (folder / "checkpoint-500").mkdir()
    for name in ("model.fp16.safetensors", "pytorch_model.bin", "checkpoint-500/model.safetensors", "README.md",
                 "checkpoint-500/config.json", "onnx_config.json"):  # fmt: skip
        (folder / name).write_text("not to be fetched")


@contextlib.contextmanager
def visit(folder: Path, cache: Path, refuse: tuple[int, dict] | None = None, offline=False) -> Iterator[list[str]]:
    """Meanwhile huggingface_hub in this process asks the hub of `serve` and caches in `cache`, or only reads `cache`.
    Yields the names of the files fetched so far, in order."""
    with serve(folder, refuse) as (url, fetched), pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        yield fetched


@contextlib.contextmanager
def serve(folder: Path, refuse: tuple[int, dict] | None = None) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub whose every repository is `folder`, and the names of the files fetched so far, in order.

    Once a file is fetched, every branch moves on to another commit. refuse: the status and headers of an answer to
    every request."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, status: int, headers: dict, body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            if refuse:
                return self.reply(*refuse)
            if "/resolve/" in path:
                commit, _, name = path.split("/resolve/")[1].partition("/")
                body = (folder / name).read_bytes()
                if self.command == "GET":
                    fetched.append(name)
                etag = f'"{hashlib.sha1(body).hexdigest()}"'
                return self.reply(200, {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, body)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if "/tree/" in path:
                found = [{"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size,
                          "oid": hashlib.sha1(path.read_bytes()).hexdigest()} for path in files]  # fmt: skip
            else:
                siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
                commit = NEWER if fetched else COMMIT
                found = {"id": "a/b", "sha": commit, "siblings": siblings, "private": False, "gated": False}
            self.reply(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
