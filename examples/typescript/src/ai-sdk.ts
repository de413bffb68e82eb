/** Answers, feedback, streams and a tool with Vercel's AI SDK: its default, the Responses API, and chat completions. */

import { createOpenAI } from "@ai-sdk/openai";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import { key, model, sendFeedback, url } from "./hydra.js";

const hydra = createOpenAI({ baseURL: url, apiKey: key });
const prompt = "Which tea for Monday?";
const headers = { "x-hydra-user": process.argv[2] ?? "ada" };

for (const [name, spoken] of [
  ["responses", hydra(model)],
  ["chat", hydra.chat(model)],
] as const) {
  const { text, response } = await generateText({ model: spoken, prompt, headers });
  console.log(`${name}: ${text}; personal: ${response.headers?.["x-hydra-personalized"]}`);
  await sendFeedback({ request_id: response.id, rating: 1 });

  const streamed = streamText({ model: spoken, prompt, headers });
  for await (const piece of streamed.textStream) process.stdout.write(piece);
  console.log();

  const stock = tool({
    description: "How much of a tea there is",
    inputSchema: z.object({ tea: z.string() }),
    execute: async ({ tea }) => `plenty of ${tea}`,
  });
  const tools = { stock };
  const stopWhen = stepCountIs(3);
  const called = await generateText({ model: spoken, prompt, headers, tools, stopWhen });
  console.log(`steps with a tool: ${called.steps.length}`);
}
