"""What a server refuses, and that nothing that is sent to it brings it down or makes it wait."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import string
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.types import Message

from tests.replicas import jobs
from tests.serve.client import ROW, Server
from wan_mlperf.serve import guard
from wan_mlperf.serve.errors import Refused
from wan_mlperf.serve.metrics import Metrics
from wan_mlperf.serve.server import bind, is_local

POSTS = ("/v1/videos/generations", "/v1/videos/sync", "/v1/videos", "/session")
# Values of every kind of JSON for every field: what is right by chance must still break one rule, so a field is always wrong.
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
WRONG = {"prompt": "", "size": "720x1280", "num_frames": 7, "seed": -5, "guidance_scale": "x", "unknown": 1, "model": 5}
FIELDS = st.dictionaries(st.sampled_from([*ROW, "model", "latent_path"]), ANY, max_size=4)
BODIES = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda values, name: json.dumps({**ROW, **values, name: WRONG[name]}).encode(), FIELDS, st.sampled_from([*WRONG])),
    st.builds(lambda depth: b'{"prompt":' + b"[" * depth, st.integers(1, 60_000)),
    st.builds(lambda text: f"prompt={text}&size=1".encode(errors="replace"), st.text(max_size=50)),
)
KINDS = st.sampled_from(
    ["application/json", "multipart/form-data", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "", "x"]
)
PATHS = st.sampled_from(POSTS) | st.text(string.ascii_letters + string.digits + "/._-%", max_size=30).map(
    lambda text: f"/v1/{text}"
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(["POST", "PUT", "PATCH"]), path=PATHS, kind=KINDS, body=BODIES)
@example(method="POST", path="/v1/videos", kind="multipart/form-data; boundary=x", body=b"--x\r\n\r\n\r\n--x--")
@example(method="POST", path="/v1/videos", kind="application/json", body=b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}")
@example(method="POST", path="/v1/videos/sync", kind="application/json", body=b'{"prompt": "a", "prompt": "b"}')
@example(method="POST", path="/v1/videos/sync", kind="application/json", body=b'{"prompt": "a", "seconds": NaN}')
@example(method="POST", path="/v1/videos/sync", kind="application/json", body=b'{"prompt": "a", "guidance_scale": 1e999}')
def test_malformed_requests_are_refused(served: Server, method: str, path: str, kind: str, body: bytes) -> None:
    answer = served.ask(method, path, body, headers={"Content-Type": kind} if kind else {}, timeout=20)
    assert 400 <= answer.status < 500, (answer.status, answer.body)
    assert answer.error["message"]


QUERIES = ["limit=0", "limit=x", "limit=0000000500", f"limit={'9' * 5000}", "limit=", "order=up", "after=nobody"]


@pytest.mark.parametrize("path", [f"/v1/videos?{query}" for query in QUERIES])
def test_malformed_queries_are_refused(served: Server, path: str) -> None:
    assert served.ask("GET", path).status == 400
    assert served.ask("GET", f"/v1/videos?limit={'0' * 5000}1").status == 200


@pytest.mark.parametrize("path", ["/v1/videos/generations", "/v1/videos/sync"])
def test_what_only_makes_videos_is_no_video(served: Server, path: str) -> None:
    for method in ("GET", "HEAD", "DELETE", "PUT"):
        answer = served.ask(method, path)
        assert answer.status == 405 and answer.headers["allow"] == "POST"


def test_a_question_for_the_headers_of_events_ends(served: Server) -> None:
    """It has no body: the next request on the connection is answered at once."""
    with closing(http.client.HTTPConnection(served.host, served.port, timeout=20)) as connection:
        connection.request("HEAD", "/live/events")
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.headers["content-type"].split(";")[0]) == (200, "text/event-stream")
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200


PART = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/x-www-form-urlencoded", b"prompt=%ff%fe"),
        ("application/x-www-form-urlencoded", b"prompt=caf\xe9"),
        ("application/x-www-form-urlencoded", b"&".join(b"a%d=1" % number for number in range(99))),
        ("multipart/form-data; boundary=x", PART % (b"prompt", b"caf\xe9") + b"--x--\r\n"),
        ("multipart/form-data; boundary=x", PART % (b"prompt", b"a") + PART % (b"seed", b"7")),
    ],
)
def test_a_form_that_would_be_misread_is_refused(served: Server, kind: str, body: bytes) -> None:
    answer = served.ask("POST", "/v1/videos", body, headers={"Content-Type": kind})
    assert answer.status == 400 and answer.error["code"] == "invalid_form"


def test_forms_in_utf_8(served: Server) -> None:
    urlencoded, multipart = "application/x-www-form-urlencoded", 'multipart/form-data; boundary="x"'
    text = "caf\u00e9 now"
    for kind, body in (
        (urlencoded, f"prompt={text.replace(' ', '+')}&seed=7".encode()),
        (urlencoded, b"prompt=caf%c3%a9%20now&seconds=1"),
        (multipart, PART % (b"prompt", text.encode()) + PART % (b"guidance_scale", b"4") + b"--x--"),
    ):
        answer = served.ask("POST", "/v1/videos", body, headers={"Content-Type": kind})
        assert answer.status == 200 and answer.json["prompt"] == text, answer.body
        served.ask("DELETE", f"/v1/videos/{answer.json['id']}")


@pytest.mark.parametrize("name", ["..", "%2e%2e%2fmanifest.json", "manifest.json", "video_", "a" * 5000])
def test_names_of_a_request_reach_no_file(served: Server, name: str) -> None:
    job = served.ask("POST", "/v1/videos", {"prompt": "a red circle"}).json["id"]  # the first one makes the manifest
    served.ask("DELETE", f"/v1/videos/{job}")
    for method, path in (("GET", f"/v1/videos/{name}/content"), ("GET", f"/v1/videos/{name}"), ("DELETE", f"/v1/videos/{name}")):
        assert served.ask(method, path).status in (404, 405)
    assert (served.folder / "manifest.json").is_file()


def test_raw_bytes_that_are_not_http(served: Server) -> None:
    for content in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"\0" * 100 + b"\r\n\r\n"):
        with socket.create_connection((served.host, served.port), timeout=20) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100)[:10] in (b"", b"HTTP/1.1 4")


def test_a_body_that_is_too_long(served: Server) -> None:
    answer = served.ask("POST", "/v1/videos", {"prompt": "a" * 300_000})
    assert answer.status == 413 and answer.error["code"] == "body_too_long"


@pytest.mark.parametrize("more", ["", "Expect: 100-continue\r\n"])
def test_a_length_above_the_limit_is_refused_before_the_body(served: Server, more: str) -> None:
    head = f"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n{more}\r\n"
    with socket.create_connection((served.host, served.port), timeout=20) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_the_time_of_a_body_does_not_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part every 0.1 s is no way to hold a connection for ever."""
    monkeypatch.setattr(guard, "BODY_S", 0.5)

    async def part() -> Message:
        await asyncio.sleep(0.1)
        return {"type": "http.request", "body": b"a", "more_body": True}

    async def read() -> int:
        receive = guard._Body(part)
        for parts in range(100):
            try:
                await receive()
            except Refused as refused:
                assert refused.status == 408
                return parts
        raise AssertionError("it never timed out")

    assert asyncio.run(read()) < 6


def test_a_body_that_never_ends_is_given_up(served: Server) -> None:
    with socket.create_connection((served.host, served.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)  # as a client that died
        connection.recv(1000)
    assert served.ask("GET", "/health").status == 200


@pytest.mark.slow
def test_a_body_that_does_not_come_times_out(served: Server) -> None:
    with socket.create_connection((served.host, served.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        begin = time.monotonic()
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begin < 45


def test_pages_of_other_sites_are_kept_out(served: Server) -> None:
    """No CORS; and a form that another site's page sends in its visitor's name makes no video."""
    own = {"Origin": served.url}
    assert served.ask("GET", "/health", headers=own).status == 200
    for headers in (
        {"Origin": "https://example.com"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        answer = served.ask("POST", "/v1/videos", {"prompt": "a red circle"}, headers=headers)
        assert answer.status == 403 and "access-control-allow-origin" not in answer.headers
    for host in ("evil.example:80", "[", "[::1"):
        rebound = served.ask("GET", "/v1/videos", headers={"Host": host})
        assert rebound.status == 403 and rebound.error["code"] == "host_not_allowed"
    assert served.ask("OPTIONS", "/v1/videos", headers={**own, "Access-Control-Request-Method": "POST"}).status == 405


def test_the_page_runs_its_own_script_only(served: Server) -> None:
    answer = served.ask("GET", "/")
    policy = answer.headers["content-security-policy"]
    assert answer.status == 200 and "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    text = answer.body.decode()
    assert "http://" not in text and "https://" not in text and "innerHTML" not in text


def test_health_and_metrics(served: Server, model: Path) -> None:
    served.ask("POST", "/v1/videos/sync", ROW)
    served.ask("POST", "/v1/videos/sync", {})
    assert served.ask("GET", "/health").json == {"status": "ok"}
    lines = dict(line.rsplit(" ", 1) for line in served.ask("GET", "/metrics").body.decode().splitlines() if line[0] != "#")
    assert float(lines['wan_mlperf_videos_total{outcome="completed",route="sync"}']) >= 1
    assert float(lines['wan_mlperf_stage_seconds_sum{stage="denoise_low"}']) > 0
    assert float(lines['wan_mlperf_refused_total{status="400"}']) >= 1
    assert float(lines['wan_mlperf_jobs{state="waiting"}']) == 0
    about = served.ask("GET", "/about").json
    assert about["made_by"]["kernels"]["cross"] and about["made_by"]["commit"] and str(model.parent) not in json.dumps(about)
    assert len(about["plan"]) == about["workload"]["steps"] == 2 and served.ask("GET", "/live").json["jobs"] == []


@pytest.mark.slow
def test_a_token_is_asked_for(tmp_path: Path, model: Path) -> None:
    (tmp_path / "token").write_text("a secret\n".replace(" ", "-"))
    recipe = jobs.write_recipe(tmp_path, model)
    with Server(recipe, tmp_path / "videos", "--token-file", str(tmp_path / "token")).ready().running() as server:
        for path in ("/v1/videos", "/metrics", "/live", "/about", "/v1/models"):
            for headers in ({}, {"Authorization": "Bearer a-secre"}, {"Cookie": "wan_mlperf_session=a-secret"}):
                answer = server.ask("GET", path, headers=headers)
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert server.ask("GET", path, headers={"Authorization": "Bearer a-secret"}).status == 200
        assert server.ask("POST", "/v1/videos/sync", ROW).status == 401
        assert server.ask("GET", "/health").status == server.ask("GET", "/").status == 200
        assert server.ask("POST", "/session", {"token": "wrong"}).status == 401
        cookie = server.ask("POST", "/session", {"token": "a-secret"}).headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and "a-secret" not in cookie
        assert server.ask("GET", "/v1/videos", headers={"Cookie": cookie.partition(";")[0]}).status == 200
    assert "a-secret" not in server.job.output


@pytest.mark.parametrize(("host", "local"), [("127.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_the_bound_address_decides_who_may_ask(host: str, local: bool) -> None:
    with bind(host, 0) as taken:
        assert is_local(taken) is local


def test_a_token_that_is_not_text_is_wrong() -> None:
    assert guard.Access(token="?", only_local=False).session("\ud800") is None


def test_a_bug_in_the_guard_is_answered_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised again, so that uvicorn logs it."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    access = guard.Access(token=None, only_local=True)
    monkeypatch.setattr(guard.Access, "check", lambda *_: 1 / 0)
    app = guard.Guard(lambda *_: asyncio.sleep(0), access, Metrics())
    with pytest.raises(ZeroDivisionError):
        asyncio.run(app({"type": "http", "path": "/", "headers": []}, asyncio.Queue[Message]().get, send))
    assert sent[0]["status"] == 500 and json.loads(sent[1]["body"])["error"]["code"] == "internal_error"


def test_bad_flags_are_one_line(tmp_path: Path, model: Path) -> None:
    from wan_mlperf.errors import BadInput
    from wan_mlperf.serve.__main__ import main

    recipe = jobs.write_recipe(tmp_path, model)
    (tmp_path / "empty").write_text("\n")
    taken = socket.create_server(("127.0.0.1", 0))
    cases: list[tuple[list[Any], str]] = [
        (["--most-waiting", "0"], "--most-waiting: 0"),
        (["--drain", "-1"], "--drain: -1"),
        (["--any-workload", "--recipe-workload"], "allowed: one of them"),
        (["--latents", tmp_path / "nowhere"], "--latents"),
        (["--token-file", tmp_path / "nowhere"], "--token-file"),
        (["--token-file", tmp_path / "empty"], "does not hold one line"),
        (["--port", "70000"], "--port: 70000"),
        (["--port", taken.getsockname()[1]], "Address already in use"),
        (["--host", "no such host"], "--host no such host"),
        (["--folder", recipe], "not writable"),
        (["--recipe", "nobody"], "recipe 'nobody'"),
    ]
    for arguments, message in cases:
        words = ["--recipe", str(recipe), "--folder", str(tmp_path / "videos"), "--port", "0", *map(str, arguments)]
        with pytest.raises(BadInput, match=message):
            main(words)
    taken.close()
