// What the trainer sends: one request at a time, and events as they come.
// EventSource cannot show a token; fetch can, and reads the same text.

const KEY = "kleash-token";
const SILENCE_MS = 40_000;  // the trainer shows a sign of life every 15 s

export class Refused extends Error {}

export const token = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (text) => sessionStorage.setItem(KEY, text),
  forget: () => sessionStorage.removeItem(KEY),
};

function headers(more = {}) {
  return token.get() ? { Authorization: "Bearer " + token.get(), ...more } : more;
}

async function answer(response) {
  if (response.ok) return response;
  let message = `the trainer answers ${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message; } catch { /* a proxy's page */ }
  if (response.status === 401 || response.status === 403) throw new Refused(message);
  throw new Error(message);
}

export async function get(path) {
  return (await answer(await fetch(path, { headers: headers(), cache: "no-store" }))).json();
}

export async function post(path) {
  const options = { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: "{}" };
  return (await answer(await fetch(path, options))).json();
}

// Yields {event, data, id} until the connection ends; throws when it breaks or is silent.
export async function* events(path, lastId, abort) {
  const response = await answer(await fetch(path, {
    headers: headers(lastId ? { "Last-Event-ID": String(lastId) } : {}), cache: "no-store", signal: abort.signal,
  }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", timer;
  const listen = () => { clearTimeout(timer); timer = setTimeout(() => abort.abort(), SILENCE_MS); };
  try {
    for (;;) {
      listen();
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const found = {};
        for (const line of block.split("\n")) {
          const at = line.indexOf(": ");
          if (at > 0) found[line.slice(0, at)] = line.slice(at + 2);
        }
        if (found.event) yield { event: found.event, data: JSON.parse(found.data), id: found.id };
      }
    }
  } finally {
    clearTimeout(timer);
    reader.cancel().catch(() => {});
  }
}
