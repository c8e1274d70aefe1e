// The public HTTP API, and nothing else of the server: models, and a streamed answer as parsed chunks.
// Knows no page. The API key lives in sessionStorage: it goes when the tab does.

const KEY = "dgemma.key";
const BASE = new URL(".", location.href);

// `status` 0: no answer at all (server gone, connection cut).
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", param = "", retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY));
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. It may have stopped, or the connection is gone.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // no JSON: something between the page and the server answered
  }
  return new ApiError(told.message || `The server answered ${response.status} ${response.statusText}`.trim(), {
    status: response.status,
    code: told.code ?? "",
    param: told.param ?? "",
    retryAfter: Number(response.headers.get("retry-after")) || 0,
  });
}

export async function models() {
  return (await (await call("v1/models")).json()).data;
}

// Yields the chunks of a streamed answer. Ends without `[DONE]` are an ApiError; an abort is an AbortError.
export async function* stream(path, body, signal) {
  const response = await call(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) throw new ApiError("The connection ended before the answer did.");
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, { status: 500, code: chunk.error.code ?? "" });
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection to the server broke off.");
  }
}
