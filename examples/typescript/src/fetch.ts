/** Records, a personal answer, feedback on it and a stream, by plain `fetch`. */

import { addRecords, ask, askStream, isPersonal, records, sendFeedback } from "./hydra.js";

const user = process.argv[2] ?? "ada";
const days = ["Tuesday", "Wednesday", "Thursday", "Friday", "Sunday"];
const added = await addRecords(
  user,
  days.map((day) => ({ id: day, input: `Which tea for ${day}?`, output: "peppermint" })),
);
console.log("records added:", added);

const answer = await ask(user, "Which tea for Monday?");
console.log(answer.choices[0]?.message.content);
const how = answer.personalization;
console.log(`personal: ${isPersonal(how)}`, isPersonal(how) ? how.records : "");

await sendFeedback({ request_id: answer.id, rating: 1 });

for await (const chunk of askStream(user, "Which tea for Monday?")) {
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  if (chunk.personalization) console.log(`\npersonal: ${isPersonal(chunk.personalization)}`);
}
console.log("records now:", (await records(user)).length); // with what the feedback taught
