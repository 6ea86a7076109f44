// Reads a stream of server-sent events, as chat completions send them.

/** Yields the JSON of every event. body: a ReadableStream of bytes. */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      ended = done;
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data !== "[DONE]") yield JSON.parse(data); // after it, wait for the connection's own end
      }
    }
  } finally {
    if (!ended) reader.cancel().catch(() => {}); // the connection may be gone already
  }
}
