// A process that a test drives: calls come as JSON lines, and what they see goes back as JSON lines (tests/kit/node.py).
import { createInterface } from "node:readline";

/** `calls` are functions of a call's arguments and of `tell`, which sends what they see on the way. */
export function serve(calls) {
  const write = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
  const lines = createInterface({ input: process.stdin });
  lines.on("line", async (line) => {
    const { id, call, ...given } = JSON.parse(line);
    try {
      const value = await calls[call](given, (seen) => write({ id, seen }));
      write({ id, value: value ?? null });
    } catch (error) {
      write({ id, error: described(error) });
    }
  });
  lines.on("close", () => process.exit());
}

function described(error) {
  const { name, message, status, code, type, param } = error;
  return { class: error.constructor.name, name, message, status, code, type, param };
}

/** A `fetch` that goes to `door.url`, wherever that leads at the moment, with `door.token` where there is one. */
export function through(door) {
  return (input, init = {}) => {
    const { pathname, search } = new URL(input);
    const headers = new Headers(init.headers);
    if (door.token) headers.set("Authorization", `Bearer ${door.token}`);
    return fetch(door.url + pathname + search, { ...init, headers });
  };
}
