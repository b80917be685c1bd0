// node aisdk.mjs PACKAGE: the chat that useChat is a hook around, without React
import { WorkflowChatTransport } from "@ai-sdk/workflow/client";
import { serve, through } from "./driver.mjs";

const { AbstractChat, DefaultChatTransport, readUIMessageStream } = await import(process.argv[2]);
const TRANSPORTS = { default: DefaultChatTransport, workflow: WorkflowChatTransport };
const chats = new Map();

class Chat extends AbstractChat {
  constructor({ id, door, transport = "default", options = {}, messages = [] }) {
    const seen = { finishes: [], data: [], errors: [], run: undefined };
    super({
      id,
      transport: new TRANSPORTS[transport]({
        api: `${door.url}/ai/chat`,
        fetch: through(door),
        onChatSendMessage: ({ headers }) => (seen.run = headers.get("x-workflow-run-id")),
        ...options,
      }),
      state: new State(messages, () => this.tell?.({ status: this.status, parts: this.lastMessage?.parts ?? [] })),
      onFinish: ({ isAbort, isDisconnect, isError }) => seen.finishes.push({ isAbort, isDisconnect, isError }),
      onData: (part) => seen.data.push(part),
      onError: (error) => seen.errors.push(error.message),
    });
    Object.assign(this, { door, seen });
  }

  report() {
    return { status: this.status, messages: this.messages, ...this.seen };
  }
}

/** What React's useState is in the hook. */
class State {
  #status = "ready";

  constructor(messages, changed) {
    Object.assign(this, { messages, changed, error: undefined });
  }

  get status() {
    return this.#status;
  }

  set status(status) {
    this.#status = status;
    this.changed();
  }

  snapshot = structuredClone;

  pushMessage = (message) => this.#set([...this.messages, message]);
  popMessage = () => this.#set(this.messages.slice(0, -1));
  replaceMessage = (index, message) => this.#set(this.messages.with(index, structuredClone(message)));

  #set(messages) {
    this.messages = messages;
    this.changed();
  }
}

/** Does it with the chat, and tells each change of its status and of its last message; returns what has become of it. */
function withChat(act) {
  return async ({ chat: id, ...given }, tell) => {
    const chat = chats.get(id);
    chat.tell = tell;
    await act(chat, given);
    return chat.report();
  };
}

serve({
  // As after a page load: `messages` are what the page has kept.
  open: ({ chat, url, token, ...how }) => {
    chats.set(chat, new Chat({ id: chat, door: { url, token }, ...how }));
  },
  move: ({ chat, url }) => {
    chats.get(chat).door.url = url;
  },
  send: withChat((chat, { text, body }) => chat.sendMessage({ text }, { body })),
  resume: withChat((chat) => chat.resumeStream()),
  regenerate: withChat((chat, { body }) => chat.regenerate({ body })),
  // What a stop button does: the client lets go of the stream, and the service ends the run.
  stop: withChat(async (chat) => {
    await chat.stop();
    const key = chat.seen.run ?? chat.id; // the transport of workflows names only the run
    await through(chat.door)(`${chat.door.url}/ai/chat/${key}/stop`, { method: "POST" });
  }),
  // What a page that goes away does.
  leave: withChat((chat) => chat.stop()),
  // The stream without a chat around it.
  read: async ({ chat, url, token, text, body }, tell) => {
    const transport = new DefaultChatTransport({ api: `${url}/ai/chat`, fetch: through({ url, token }) });
    const messages = [{ id: "question", role: "user", parts: [{ type: "text", text }] }];
    const stream = await transport.sendMessages({ chatId: chat, messages, trigger: "submit-message", body });
    let last;
    for await (const message of readUIMessageStream({ stream })) tell((last = message));
    return last;
  },
  // What the client makes of a stream's bytes.
  make: async ({ body }) => {
    const headers = { "Content-Type": "text/event-stream" };
    const answer = async () => new Response(Buffer.from(body, "base64"), { headers });
    const transport = new DefaultChatTransport({ api: "http://nowhere/ai/chat", fetch: answer });
    const stream = await transport.sendMessages({ chatId: "a chat", messages: [], trigger: "submit-message" });
    const errors = [];
    let message;
    for await (const state of readUIMessageStream({ stream, onError: (error) => errors.push(error.message) }))
      message = state;
    return { id: message?.id, parts: message?.parts ?? [], errors };
  },
});
