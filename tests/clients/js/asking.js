// A page that asks by fetch-event-source, which repeats its POST when it is cut. `seen` is what has come.
import { fetchEventSource } from "@microsoft/fetch-event-source";

const { url, token, body } = JSON.parse(new URLSearchParams(location.search).get("page"));
globalThis.seen = [];
globalThis.over = false;

fetchEventSource(`${url}/api/v1/query/stream`, {
  method: "POST",
  headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json" },
  body: JSON.stringify(body),
  openWhenHidden: true,
  onmessage: (message) => seen.push(message),
  onclose: () => (globalThis.over = true),
});
