"""The page's files as they are served: types, policy, caching, and nothing that would ask another origin."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

import page_kit
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dgemma.server import page

FILES = sorted((page_kit.MODELS.parent / "server" / "page").iterdir())


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    page.mount(app)
    return TestClient(app)


def test_every_file_is_served_under_a_strict_policy(client: TestClient) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for name in ["/", *(f"/page/{path.name}" for path in FILES)]:
        answer = client.get(name)
        assert answer.status_code == 200, name
        path = next((path for path in FILES if name.endswith(path.name)), FILES[0].with_name("index.html"))
        assert answer.content == path.read_bytes()
        assert answer.headers["content-type"].split(";")[0] == types[path.suffix]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


def test_a_known_file_is_not_sent_again(client: TestClient) -> None:
    etag = client.get("/page/style.css").headers["etag"]
    again = client.get("/page/style.css", headers={"if-none-match": f'"other", W/{etag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/style.css", headers={"if-none-match": '"other"'}).status_code == 200
    assert client.get("/page/main.js").headers["etag"] != etag
    head = client.head("/")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("name", ["page.py", "..%2fpage.py", "%2e%2e/page.py", "nothing.js", "%2fetc%2fpasswd", ""])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_the_files_name_no_other_origin_and_refer_to_each_other() -> None:
    names = {path.name for path in FILES}
    for path in FILES:
        text = path.read_text(encoding="utf-8").replace('"http://www.w3.org/2000/svg"', "")
        assert not re.search(r"(?:https?:)?//[\w.-]+\.\w", text), path.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\sstyle=|\son\w+=\"", text
        )
        assert len(text.splitlines()) < 400, path.name
        for used in re.findall(r'(?:from "\./|"page/)([\w.]+)"', text):
            assert used in names, f"{path.name} asks for {used}"
