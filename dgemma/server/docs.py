"""/docs: the routes and their fields as a plain page, made from the OpenAPI document. Needs no other server."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import FastAPI, Response

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
:root { color-scheme: light dark } h2 { margin-top: 2.5rem } code { font-size: .95em }
table { border-collapse: collapse; width: 100% } td { border-top: 1px solid #8884; padding: .3rem .6rem .3rem 0 }
td { vertical-align: top } td:nth-child(2) { opacity: .7 }
"""


def mount(app: FastAPI) -> None:
    """Add `/docs` to `app`."""

    async def docs() -> Response:
        headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
        return Response(page(app.openapi()), media_type="text/html; charset=utf-8", headers=headers)

    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)


def page(document: dict[str, Any]) -> str:
    """An OpenAPI document as HTML."""
    schemas = document.get("components", {}).get("schemas", {})
    parts = [f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>"]
    parts.append(f"<p>{escape(document['info'].get('description', ''))}</p>")
    parts.append('<p>The same for programs: <a href="/openapi.json">openapi.json</a>.</p>')
    told: list[str] = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('summary', ''))}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            parts += [_table(name, schemas, told) for name in _names(body)]
    while told:
        name = told.pop(0)
        if f'id="{name}"' not in "".join(parts):
            parts.append(f'<h2 id="{escape(name)}">{escape(name)}</h2>{_table(name, schemas, told)}')
    style = f"<style>{_STYLE}</style>"
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"{head}<title>dgemma: the API</title>{style}<body>{''.join(parts)}</body></html>"


def _table(name: str, schemas: dict[str, Any], told: list[str]) -> str:
    """The fields of a schema; schemas that they name are added to `told`."""
    schema = schemas.get(name, {})
    required = schema.get("required", ())
    rows = []
    for field, about in schema.get("properties", {}).items():
        for other in _names(about):
            told.append(other)
        mark = " (required)" if field in required else ""
        rows.append(
            f"<tr><td><code>{escape(field)}</code>{mark}</td><td>{_kind(about)}</td>"
            f"<td>{escape(about.get('description', ''))}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _kind(about: dict[str, Any]) -> str:
    """The type of a field in a few words."""
    if "$ref" in about:
        name = escape(about["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in about:
        return " or ".join(dict.fromkeys(_kind(one) for one in about["anyOf"] if one != {"type": "null"}))
    if "enum" in about or "const" in about:
        return escape(", ".join(map(str, about.get("enum", [about.get("const")]))).replace("None", "null"))
    if about.get("type") == "array":
        return f"list of {_kind(about.get('items', {}))}"
    bounds = [
        f"{sign} {about[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in about
    ]
    return escape(" ".join([str(about.get("type", "anything")), *bounds]))


def _names(about: Any) -> list[str]:
    """The schemas that a field refers to, in order."""
    if isinstance(about, dict):
        own = [about["$ref"].rpartition("/")[2]] if isinstance(about.get("$ref"), str) else []
        return own + [name for value in about.values() for name in _names(value)]
    return [name for value in about for name in _names(value)] if isinstance(about, list) else []
