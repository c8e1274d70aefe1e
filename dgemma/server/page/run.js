// One request from the page: builds its body, reads the stream, fills the record of the answer.
// Knows the API's chunks; draws nothing.

import { stream } from "./api.js";

// The messages of a conversation up to and with `turn`; turns that were never answered are left out.
export function messages(conversation, turn) {
  const before = conversation.turns.slice(0, conversation.turns.indexOf(turn));
  return [
    ...(conversation.system.trim() ? [{ role: "system", content: conversation.system }] : []),
    ...before.filter((one) => one.answer?.text)
      .flatMap((one) => [{ role: "user", content: one.user }, { role: "assistant", content: one.answer.text }]),
    { role: "user", content: turn.user },
  ];
}

export function requestOf(model, conversation, turn, settings) {
  const own = Boolean(model.dgemma);
  const options = { include_usage: true, ...(own ? { include_canvas: true } : {}) };
  const body = { model: model.id, stream: true, stream_options: options, ...settings };
  return speaks(model)
    ? ["v1/chat/completions", { ...body, messages: messages(conversation, turn) }]
    : ["v1/completions", { ...body, prompt: turn.user }];
}

// Whether the model has a chat template; one that does not say so is taken to.
export const speaks = (model) => model.dgemma?.chat !== false;

// Fills `record` while the answer comes. `feed` gets {line}, {text} and {thought} in the order of the stream.
export async function run([path, body], record, feed, signal) {
  const lines = [];
  try {
    for await (const chunk of stream(path, body, signal)) take(chunk, record, lines, feed);
  } finally {
    measure(record, lines);
  }
  return lines;
}

function take(chunk, record, lines, feed) {
  const { dgemma, usage } = chunk;
  if (dgemma?.line) {
    lines.push(dgemma.line);
    record.seed ??= dgemma.line.seed ?? null;
    feed({ line: dgemma.line });
  }
  record.seed ??= dgemma?.seed ?? null;
  if (dgemma?.trace_id) record.traceId = dgemma.trace_id;
  const choice = chunk.choices?.[0];
  if (choice) {
    const text = choice.delta?.content ?? choice.text ?? "";
    const thought = choice.delta?.reasoning_content ?? "";
    record.text += text;
    record.thought += thought;
    if (text || thought) feed({ text, thought });
    record.reason = choice.finish_reason ?? record.reason;
  }
  if (usage) {
    const own = usage.dgemma ?? {};
    record.numbers = { tokens: usage.completion_tokens, seconds: own.seconds ?? 0, steps: own.denoising_steps ?? 0,
      perForward: own.tokens_per_forward ?? 0 };
  }
}

// An answer that was stopped has no usage: the trace tells what there was.
function measure(record, lines) {
  if (record.numbers) return;
  const committed = lines.filter((line) => line.type === "committed");
  const drafts = lines.filter((line) => line.type === "draft").length;
  const tokens = committed.reduce((sum, line) => sum + line.tokens.length, 0);
  record.numbers = { tokens, seconds: lines.at(-1)?.seconds ?? 0, steps: drafts,
    perForward: tokens ? tokens / (drafts + committed.length) : 0 };
}
