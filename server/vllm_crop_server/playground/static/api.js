// Talks to the server this page came from, with the key typed into the page; every failure becomes words.
import { eventsOf } from "./events.js";

// Relative to the page, so that a proxy's path prefix stays in front.
const V1 = new URL("../../v1/", document.baseURI);

/** A failure, in words for the reader; `status` is 0 where no server answered. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export class Server {
  /** keyNow: gives the API key at the time of a request, "" for none. */
  constructor(keyNow) {
    this.keyNow = keyNow;
  }

  /** Whether this server asks for a key. */
  async keyNeeded() {
    const response = await reach(new URL("access.json", document.baseURI), {});
    if (!response.ok) throw await refusal(response);
    return (await response.json()).key_needed;
  }

  /** The name of the served model. */
  async model() {
    return (await this.#json("models")).data[0].id;
  }

  settings() {
    return this.#json("plugins/crop/settings");
  }

  plan(body) {
    return this.#json("plugins/crop/plan", body);
  }

  /**
   * Stream a chat completion.
   * onFacts gets the parsed x-crop-facts header (null without one), onText each new piece of the answer.
   * Returns {facts, usage, firstTokenMs}.
   */
  async chat(body, signal, onFacts, onText) {
    const start = performance.now();
    const response = await this.#fetch("chat/completions", body, signal);
    const header = response.headers.get("x-crop-facts");
    const facts = header && JSON.parse(header);
    onFacts(facts);
    let usage = null;
    let firstTokenMs = null;
    for await (const event of eventsOf(response.body)) {
      if (event.error) throw new Failure(event.error.message ?? String(event.error), event.error.code);
      const delta = event.choices?.[0]?.delta;
      const text = delta?.content || delta?.reasoning || "";
      if (text) {
        firstTokenMs ??= performance.now() - start;
        onText(text);
      }
      usage = event.usage ?? usage;
    }
    return { facts, usage, firstTokenMs };
  }

  async #json(path, body) {
    return (await this.#fetch(path, body)).json();
  }

  async #fetch(path, body, signal) {
    const headers = {};
    if (this.keyNow()) headers.Authorization = `Bearer ${this.keyNow()}`;
    if (body) headers["Content-Type"] = "application/json";
    const options = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
    const response = await reach(new URL(path, V1), options);
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function reach(url, options) {
  try {
    return await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (/ISO-8859-1|ByteString/.test(error.message)) throw new Failure("The API key has letters no key can have.", 401);
    throw new Failure("The server cannot be reached. Is it running?");
  }
}

async function refusal(response) {
  if (response.status === 401) return new Failure("The server does not accept this API key.", 401);
  let said = "";
  try {
    const { error, detail } = await response.json();
    said = error?.message ?? error ?? detail ?? "";
  } catch {
    // No JSON, such as a proxy's error page.
  }
  return new Failure(said ? String(said) : `The server answered with status ${response.status}.`, response.status);
}
