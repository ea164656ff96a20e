// The openai package of npm: completions, chat, streams and its helper, models, errors.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const found = {};

const completion = await client.completions.create({ model: "tiny", prompt: "Hi", logprobs: 2 });
found.completion = completion.choices[0].text;
found.usage = completion.usage.total_tokens;

const chat = await client.chat.completions.create({ model: "tiny", messages, n: 2 });
found.chat = chat.choices.map((choice) => choice.message.content);

found.pieces = [];
for await (const chunk of await client.chat.completions.create({ model: "tiny", messages, stream: true })) {
  found.pieces.push(chunk.choices[0].delta.content ?? "");
}

const helper = client.chat.completions.stream({ model: "tiny", messages, stream_options: { include_usage: true } });
found.final = (await helper.finalChatCompletion()).choices[0].message.content;

const whole = await client.chat.completions.create({ model: "tiny", messages }).withResponse();
found.requestId = whole.request_id;

found.models = [];
for await (const model of client.models.list()) found.models.push(model.id);

found.errors = [];
for (const body of [{ model: "tiny", temperature: 3 }, { model: "nothing" }]) {
  try {
    await client.chat.completions.create({ messages, ...body });
  } catch (error) {
    found.errors.push([error.constructor.name, error.status, error.code, error.param]);
  }
}
console.log(JSON.stringify(found));
