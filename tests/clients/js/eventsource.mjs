// node eventsource.mjs: the EventSource of npm, which takes headers
import { EventSource } from "eventsource";
import { serve, through } from "./driver.mjs";

const doors = new Map();

serve({
  // Until it is closed for good; returns the status that closed it.
  watch: ({ name, url, token, path, types }, tell) =>
    new Promise((resolve) => {
      const door = { url, token };
      doors.set(name, door);
      const source = new EventSource(url + path, { fetch: through(door) });
      const heard = ({ type, data, lastEventId }) => tell({ type, data: JSON.parse(data), id: lastEventId });
      for (const type of types) source.addEventListener(type, heard);
      source.onerror = ({ code }) => source.readyState === source.CLOSED && resolve(code);
    }),
  move: ({ name, url }) => {
    doors.get(name).url = url;
  },
});
