// node openai.mjs PACKAGE
import { serve } from "./driver.mjs";

const { default: OpenAI } = await import(process.argv[2]);

/** `lose`: so many answers get lost on their way to the client. */
function client({ url, token, lose = 0, options = {} }) {
  const losing = async (input, init) => {
    const response = await fetch(input, init);
    if (lose-- <= 0) return response;
    await response.body?.cancel();
    throw new TypeError("fetch failed");
  };
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: token, fetch: losing, ...options });
}

async function heard(events, tell) {
  for await (const event of events) tell(event);
}

serve({
  create: ({ body, ...how }) => client(how).responses.create(body),
  stream: async ({ body, ...how }, tell) => heard(await client(how).responses.create({ ...body, stream: true }), tell),
  retrieve: ({ response, query, ...how }) => client(how).responses.retrieve(response, query),
  resume: async ({ response, after, ...how }, tell) =>
    heard(await client(how).responses.retrieve(response, { stream: true, starting_after: after }), tell),
  cancel: ({ response, ...how }) => client(how).responses.cancel(response),
  delete: ({ response, ...how }) => client(how).responses.delete(response),
  // The helper, which builds the response from its events: a new one's, or of one that is there (`response_id`).
  help: async ({ body, ...how }, tell) => {
    const stream = client(how).responses.stream(body);
    await heard(stream, tell);
    const { output_text: text, ...response } = await stream.finalResponse();
    return { ...response, output_text: text };
  },
});
