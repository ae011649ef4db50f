// The JavaScript client of a local image service, as a page has it whose own server stands between.
//
//   node local_client.mjs SERVICE PROMPT '{"width": 64, "height": 64, "seed": 7}'
//
// SERVICE is the address of `/v1/generate`. Prints what the page would show, as JSON.

import { createServer, request } from "node:http";

const [service, prompt, options] = process.argv.slice(2);

/** The page's own server: it hands on what the page asks for and says nothing of for whom. */
const behind = createServer((asked, answer) => {
  const onward = request(
    service,
    { method: asked.method, headers: { "Content-Type": asked.headers["content-type"] } },
    (got) => {
      answer.writeHead(got.statusCode, got.headers);
      got.pipe(answer);
    },
  );
  asked.pipe(onward);
});

async function draw(page, prompt, { width = 1024, height = 1024, seed } = {}) {
  const answer = await fetch(`${page}/api/zimg`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      prompt,
      width,
      height,
      num_inference_steps: 8,
      guidance_scale: 0.0,
      seed: seed || Math.floor(Math.random() * 1000000),
    }),
  });
  if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  const { image } = await answer.json();
  if (!image) throw new Error("no image");
  const bytes = Uint8Array.from(atob(image), (character) => character.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
}

behind.listen(0, "127.0.0.1", async () => {
  try {
    const shown = await draw(
      `http://127.0.0.1:${behind.address().port}`,
      prompt,
      JSON.parse(options),
    );
    const blob = await (await fetch(shown)).blob();
    const bytes = Buffer.from(await blob.arrayBuffer());
    console.log(JSON.stringify({ type: blob.type, file: bytes.toString("base64") }));
  } catch (error) {
    console.log(JSON.stringify({ error: error.message }));
  } finally {
    behind.close();
    behind.closeAllConnections();
  }
});
