// A chat page as an app would have it: useChat, messages that are kept for a reload, a stop button. `hook` and
// `transport` are @ai-sdk/react and ai in one major version (tests/kit/page.py); the address says the rest.
import { useChat } from "hook";
import { useEffect, useState } from "react";
import { createRoot } from "react-dom/client";
import { DefaultChatTransport } from "transport";

const { chat, api, token, body } = JSON.parse(new URLSearchParams(location.search).get("page"));
const headers = { Authorization: `Bearer ${token}` };
const transport = new DefaultChatTransport({ api, headers, body });

function Page() {
  const { messages, status, error, sendMessage, regenerate, resumeStream, stop } = useChat({
    id: chat,
    messages: JSON.parse(sessionStorage.getItem(chat) ?? "[]"),
    resume: true,
    transport,
  });
  const [text, setText] = useState("");
  useEffect(() => sessionStorage.setItem(chat, JSON.stringify(messages)), [messages]);

  const send = (event) => {
    event.preventDefault();
    sendMessage({ text });
    setText("");
  };
  const stopAll = async () => {
    await stop();
    await fetch(`${api}/${chat}/stop`, { method: "POST", headers });
  };
  return (
    <main data-status={status}>
      {messages.map(({ id, role, parts }) => (
        <section key={id} id={id} className={role}>
          {parts.map((part, n) => (
            <p key={n} className={part.type}>
              {part.text ?? JSON.stringify(part)}
            </p>
          ))}
        </section>
      ))}
      {error && <p id="error">{error.message}</p>}
      <form onSubmit={send}>
        <input id="text" value={text} onChange={(event) => setText(event.target.value)} />
        <button id="send">Send</button>
      </form>
      <button id="stop" onClick={stopAll}>Stop</button>
      <button id="resume" onClick={() => resumeStream()}>Resume</button>
      <button id="regenerate" onClick={() => regenerate()}>Regenerate</button>
    </main>
  );
}

createRoot(document.body.appendChild(document.createElement("div"))).render(<Page />);
