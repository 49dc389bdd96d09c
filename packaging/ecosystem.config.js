// PM2: pm2 start packaging/ecosystem.config.js
//
// Flags written for the reference miner may stay as they are; docs/migrating.md
// says which have no effect. Pages and metrics are on port 18091 here: on
// the axon's plus 10000, unless --port names another.
const path = require("path");

const root = path.resolve(__dirname, "..");

module.exports = {
  apps: [
    {
      name: "lgbm-miner",
      cwd: root,
      script: "miner.py",
      interpreter: path.join(root, ".venv", "bin", "python"),
      args: [
        "--netuid", "50",
        "--subtensor.network", "finney",
        "--wallet.name", "miner",
        "--wallet.hotkey", "default",
        "--axon.port", "8091",
        "--blacklist.force_validator_permit",
        "--state-dir", path.join(root, "state"),
        "--model-dir", path.join(root, "models"),
      ],
      env: {
        // BINANCE_API_HOST: "data-api.binance.vision", // where Binance answers 451
        PYTHONUNBUFFERED: "1",
      },
      // The miner saves and ends within ten seconds; PM2's own default is 1.6.
      kill_timeout: 12000,
      // A wrong flag ends it at once, over and over: wait longer each time, up to 15 s.
      exp_backoff_restart_delay: 500,
      // Its log lines carry their own time.
      time: false,
      merge_logs: true,
    },
  ],
};
