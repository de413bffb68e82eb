/** The gateway by plain `fetch`: what its endpoints take and give, as far as the examples need it. */

export const url = process.env["HYDRA_URL"] ?? "http://127.0.0.1:8000/v1";
export const key = process.env["HYDRA_KEY"] ?? "any";
export const model = process.env["HYDRA_MODEL"] ?? "gpt-4o-mini";

/** What a user did: an input, and the answer that this user gave or wanted. */
export interface UserRecord {
  id: string;
  input: string;
  output: string;
  time?: string;
}

/** How a personal answer came about. */
export interface Personal {
  request_id: string | null;
  records: string[]; // the ids of those that were in the prompt
  warm: boolean;
  candidates: number;
  abstained: boolean;
  scores: (number | null)[];
}

/** Of an answer that is not personal there is none; a stream may have to say so at its end. */
export type Personalization = Personal | { personalized: false; reason: string };

export function isPersonal(how: Personalization | undefined): how is Personal {
  return how !== undefined && "records" in how;
}

export interface Completion {
  id: string;
  choices: { message: { role: "assistant"; content: string } }[];
  personalization?: Personalization;
}

/** A part of a streamed completion; the last ones have no choices. */
export interface Chunk {
  id: string;
  choices: { delta: { content?: string | null } }[];
  personalization?: Personalization;
}

/** Feedback on an answer; `request_id` is the completion's id. The last word stands. */
export type Feedback = { request_id: string } & (
  | { rating: number }
  | { chosen: number }
  | { edited: string }
  | { rejected: true }
);

/** Send a request. Throws what the gateway says of a fault. */
export async function send(method: string, path: string, body?: unknown): Promise<Response> {
  const reply = await fetch(url + path, {
    method,
    headers: { "content-type": "application/json", authorization: `Bearer ${key}` },
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
  });
  if (!reply.ok) throw new Error(`${method} ${path}: ${reply.status} ${await reply.text()}`);
  return reply;
}

export async function sendFeedback(feedback: Feedback): Promise<void> {
  await send("POST", "/feedback", feedback);
}

/** A user's records, the oldest first. */
export async function records(user: string): Promise<UserRecord[]> {
  const reply = await send("GET", `/users/${encodeURIComponent(user)}/records`);
  return ((await reply.json()) as { data: UserRecord[] }).data;
}

/** Add records, or replace those of the same id. Returns how many are new. */
export async function addRecords(user: string, added: UserRecord[]): Promise<number> {
  const path = `/users/${encodeURIComponent(user)}/records`;
  const reply = await send("POST", path, { records: added });
  return ((await reply.json()) as { added: number }).added;
}

/** Ask for a user: a whole completion. */
export async function ask(user: string, content: string): Promise<Completion> {
  const messages = [{ role: "user", content }];
  const reply = await send("POST", "/chat/completions", { model, user, messages });
  return (await reply.json()) as Completion;
}

/** The same as a stream of chunks (server-sent events). */
export async function* askStream(user: string, content: string): AsyncGenerator<Chunk> {
  const messages = [{ role: "user", content }];
  const reply = await send("POST", "/chat/completions", { model, user, messages, stream: true });
  let text = "";
  const decoder = new TextDecoder();
  for await (const piece of reply.body ?? []) {
    text += decoder.decode(piece, { stream: true });
    const events = text.split("\n\n");
    text = events.pop() ?? ""; // not whole yet
    for (const event of events) {
      const data = event.startsWith("data: ") ? event.slice("data: ".length) : "[DONE]";
      if (data === "[DONE]") continue; // the end, or a comment that keeps the connection open
      const chunk = JSON.parse(data) as Chunk & { error?: { message: string } };
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
