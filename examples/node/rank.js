// A planner client in JavaScript: node rank.js ADDRESS TRACE.npz SLOTS_PER_DEVICE
//
// Registers a job for the trace, reports every step for all ranks over one stream, and prints the plan that comes.
// Then it deletes the job.
'use strict'

const path = require('node:path')
const grpc = require('@grpc/grpc-js')
const loader = require('@grpc/proto-loader')
const { counts } = require('./trace.js')

const PROTO = path.join(__dirname, '..', '..', 'proto')
const definition = loader.loadSync('moeplan/v1/planner.proto', {
  includeDirs: [PROTO], keepCase: true, longs: Number, enums: String, oneofs: true, defaults: true
})
const { PlannerService } = grpc.loadPackageDefinition(definition).moeplan.v1

const [address, tracePath, slots] = process.argv.slice(2)
if (!slots) {
  console.error('usage: node rank.js ADDRESS TRACE.npz SLOTS_PER_DEVICE')
  process.exit(2)
}

const trace = counts(tracePath)
const [steps, layers, ranks, experts] = trace.shape
const client = new PlannerService(address, grpc.credentials.createInsecure())
const incarnation = Date.now() // a start later than all before it: ranks of an interrupted run are fenced out
const job = {
  incarnation,
  cluster: { slots: new Array(ranks).fill(Number(slots)) },
  layers,
  experts,
  forecast: { method: 'METHOD_MEAN', window_steps: 4 },
  replan: { every_steps: steps }
}

function fail (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`)
  process.exit(1)
}

client.CreateJob({ job_id: 'node-example', job }, (error, response) => {
  if (error) fail(error)
  const stream = client.StreamRank()
  stream.on('error', fail)
  stream.on('end', () => client.DeleteJob({ name: response.job.name }, error => error && fail(error)))
  stream.on('data', message => {
    if (message.message === 'welcome') report(stream)
    if (message.message === 'plan_update') {
      print(message.plan_update.plan)
      stream.write({ leave: { reason: 'done' } })
      stream.end()
    }
  })
  const everyRank = Array.from({ length: ranks }, (_, rank) => rank)
  stream.write({ hello: { job: response.job.name, incarnation, rank: 0, reports_for: everyRank } })
})

function report (stream) {
  const size = layers * ranks * experts * 4
  for (let step = 0; step < steps; step++) {
    const tokens = {
      shape: [layers, ranks, experts],
      type: 'DATA_TYPE_INT32',
      data: trace.data.subarray(step * size, (step + 1) * size)
    }
    stream.write({ statistics: { sequence: step + 1, step, tokens } })
  }
}

function print (plan) {
  console.log(`${plan.name}: ${plan.decision.reason} at step ${plan.decision.step}`)
  for (const layer of plan.layers) {
    const [devices, width] = layer.layout.shape
    console.log(`layer ${layer.layer}: imbalance ${layer.imbalance_before.toFixed(4)} -> ${layer.imbalance.toFixed(4)}`)
    for (let device = 0; device < devices; device++) {
      const row = Array.from({ length: width }, (_, slot) => layer.layout.data.readInt32LE((device * width + slot) * 4))
      console.log(`  device ${device}: ${row.join(' ')}`)
    }
  }
}
